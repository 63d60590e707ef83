"""Leaves placed on devices; trees on meshes with Auto and with Explicit axes, in programs of a host."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from paths import HELPERS
from virtual_devices import run_on_devices

from cluscomp_jax import CodebookArray, InputError
from cluscomp_jax.core.placement import codebook_shardings, place, shardings_by_path

W = CodebookArray(np.ones((5, 4), np.float16), np.zeros((8, 3), np.uint8), (8, 12))
MESH = Mesh(np.array(jax.devices()[:1]), ("x",))
HERE = SingleDeviceSharding(jax.devices()[0])


def sharding_of(path, sharding):
    return shardings_by_path([path], sharding)[path]


def on(*axes):
    return NamedSharding(MESH, PartitionSpec(*axes))


def test_a_kernel_is_placed_by_the_sharding_of_its_host(caplog):
    found = codebook_shardings(W, on("x"))
    assert (found.codebook.spec, found.index.spec) == (PartitionSpec(None, None), PartitionSpec("x", None))
    assert place("w", W, HERE).index.sharding == HERE
    assert place("w", W, None) is W
    assert place("w", W, found).codebook.sharding == found.codebook
    padded = CodebookArray(W.codebook, W.index, (8, 11))
    with caplog.at_level(logging.INFO, "cluscomp_jax.core.placement"):
        assert codebook_shardings(padded, on(None, "x"), "w").index.spec == PartitionSpec(None, None)
    assert "w: the index is split over (None, None), of the kernel's (None, 'x')" in caplog.text


def test_a_sharding_is_found_by_path():
    tree = {"a": [HERE, {"w": on("x")}]}
    assert sharding_of("a/1/w", tree) == on("x")
    assert sharding_of("a/1/w", {"a/1/w": HERE}.get) == HERE
    assert sharding_of("w", HERE) == HERE
    assert sharding_of("w", lambda path: None) is None
    with pytest.raises(InputError, match="sharding has no 'b'"):
        sharding_of("b", tree)
    with pytest.raises(InputError, match=r"sharding of w is a PartitionSpec, no jax\.sharding\.Sharding|a P, no"):
        sharding_of("w", lambda path: PartitionSpec())


@pytest.mark.parametrize(
    ("leaf", "sharding", "message"),
    [
        (W, on(None, None, "x"), "w has 2 axes, its sharding"),
        (np.ones(3, np.float32), on(None, "x"), "w has 1 axes, its sharding"),
        (np.ones(3, np.float32), codebook_shardings(W, HERE), "w is a dense array; its sharding is that of a Codebook"),
        (np.ones(3, np.int64), HERE, "w is int64, on a device int32; set jax_enable_x64"),
    ],
)
def test_a_sharding_that_does_not_fit_is_one_line(leaf, sharding, message):
    with pytest.raises(InputError, match=message) as error:
        place("w", leaf, sharding)
    assert "\n" not in str(error.value)


def test_arrays_keep_their_dtype():
    assert place("w", jnp.ones(3, jnp.bfloat16), HERE).dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_on_devices(HELPERS / "placed_trees.py", 4, tmp_path_factory.mktemp("mesh") / "runs.json")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "count", "limit"),
    [
        ("load", 12, 0),
        ("decompress", 12, 0),
        ("jitted decompress", 12, 0),
        ("cluster", 12, 0),
        ("heads", 6, 1e-3),
        ("scan", 6, 1e-3),
        ("loop", 6, 1e-3),
        ("decoded", 6, 1e-3),
    ],
)
def test_a_mesh_changes_nothing_but_rounding(results, name, count, limit):
    found = {key: value for key, value in results.items() if key.startswith(f"{name};")}
    assert len(found) == count
    assert not {key: value for key, value in found.items() if isinstance(value, str) or value > limit}


@pytest.mark.long
def test_an_index_is_split_as_the_kernel_is(results):
    found = {key.split(", ")[1]: value for key, value in results.items() if key.startswith("splits; Explicit")}
    assert found["both"] == str([(None, None), ("x", "y"), (None, None, None), (None, "x", "y")])
    assert found["inputs"] == str([(None, None), ("y", None), (None, None, None), (None, "y", None)])
