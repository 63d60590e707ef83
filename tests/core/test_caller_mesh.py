"""Parameters that lie on a mesh, with Auto and with Explicit axes, inside and outside of `jax.set_mesh`."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paths import HELPERS
from virtual_devices import run_on_devices

from cluscomp_jax.core.linear import linear

pytestmark = pytest.mark.long

PROGRAM = HELPERS / "caller_mesh_runs.py"
ROUNDING = 64 * float(np.finfo(np.float32).eps)
"""Of sums of at most 32 numbers of about 1, in whatever order."""


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    return run_on_devices(PROGRAM, 2, tmp_path_factory.mktemp("mesh") / "runs.json")


@pytest.mark.parametrize(
    ("name", "count", "limit"),
    [
        ("linear", 12, ROUNDING),
        ("linear, rows split", 12, ROUNDING),
        ("gradient", 6, 100 * ROUNDING),
        ("forward", 12, ROUNDING),
        ("forward, rows split", 12, ROUNDING),
        ("jitted forward", 12, ROUNDING),
        ("compress", 4, 0),
        ("compress without text", 4, 0),
        ("fit_codebook", 4, 0),
    ],
)
def test_a_mesh_changes_nothing_but_rounding(differences, name, count, limit):
    found = {key: value for key, value in differences.items() if key.startswith(f"{name};")}
    assert len(found) == count
    assert not {key: value for key, value in found.items() if isinstance(value, str) or value > limit}


def test_a_parameter_of_nnx_is_taken_for_its_array():
    x, kernel = jnp.ones((2, 8)), jnp.arange(128.0).reshape(8, 16)
    np.testing.assert_array_equal(linear(x, nnx.Param(kernel)), linear(x, kernel))
