"""Compression on two virtual devices against one: what they share, and that only rounding differs."""

import numpy as np
import pytest
from paths import HELPERS
from virtual_devices import run_on_devices

from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.errors import InputError

pytestmark = pytest.mark.long

PROGRAM = HELPERS / "spread_runs.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_on_devices(PROGRAM, 2, tmp_path_factory.mktemp("spread") / "runs.json")


@pytest.mark.parametrize("kind", ["tuned", "without text"])
def test_several_devices_make_what_one_makes(runs, kind):
    one, two = runs[kind]["one"], runs[kind]["two"]
    for path, kernel in one["kernels"].items():
        # Sums are rounded otherwise, which can move a weight that lay between two codes to the other one.
        assert np.mean(np.isclose(two["kernels"][path], kernel, rtol=0, atol=1e-3)) >= 0.99, path
    for ours, theirs in zip(two["blocks"], one["blocks"], strict=True):
        for name in ("loss_before", "epoch_losses", "held_out_losses", "loss_after"):
            assert (name in ours) == (name in theirs)
            np.testing.assert_allclose(ours.get(name, 0), theirs.get(name, 0), rtol=1e-3)


def test_kernels_of_one_input_are_clustered_on_different_devices(runs):
    devices = runs["tuned"]["two"]["devices"]
    for paths in (("self_attn/q_proj", "self_attn/k_proj"), ("mlp/gate_proj", "mlp/up_proj")):
        assert len({devices[f"1/{path}/kernel"] for path in paths}) == 2
    assert len(set(runs["tuned"]["one"]["devices"].values())) == 1


def test_samples_of_a_batch_are_spread_where_they_divide(runs):
    assert runs["tuned"]["one"]["samples"] == ["None"]
    # Statistics are of the eight samples that are not held out. Streams pass in batches of ten and one, the last whole.
    assert runs["tuned"]["two"]["samples"] == ["P(('data', 'fsdp'),)"]


def test_an_axis_that_compression_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"mesh is data=1,fsdp=2,tensor=1; .* use data"):
        CompressConfig(mesh=MeshConfig(fsdp=2))
