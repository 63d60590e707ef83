"""What depends on the release of JAX: the installed one was tried, and an unknown one loses nothing but speed."""

import logging
import os
import subprocess
import sys
import warnings

import jax
import pytest

from pallas_kernels import _compat
from verify_kernels.cases import Case
from verify_kernels.compile import lower
from verify_kernels.traffic import read_accesses

SCATTER = Case(kernel="scatter", m=32, shape=(64, 64), g=4, n=256)


def test_the_installed_release_was_tried():
    """Under a new one: try what `_compat` holds, by the tests marked `release` and by verify_kernels; then add it."""
    assert _compat.tried("jax"), jax.__version__
    assert _compat.tried("jaxlib")


def test_a_release_that_was_not_tried_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(_compat.importlib.metadata, "version", lambda _: "0.13.1.dev5")
    with caplog.at_level(logging.WARNING):
        assert not _compat.tried("jax")
        assert not _compat.tried("jax")
    (record,) = caplog.records
    assert "jax 0.13.1.dev5 was not tried with this package; tried: 0.10.2" in record.getMessage()


@pytest.mark.parametrize(("capability", "text"), [((8, 0), "8.0"), ((8, 6), "8.6"), ((8, 9), "8.9"), ((9, 0), "9.0")])
def test_pallas_lowers_for_a_card_that_is_not_here(capability, text):
    """The oracle is Pallas' own table of cards."""
    with _compat.lowering_for(capability):
        traced = jax.jit(lambda x: x + 1).trace(jax.ShapeDtypeStruct((4,), "float32"))
        assert "stablehlo.add" in traced.lower(lowering_platforms=("cuda",)).as_text()
        if jax.__version_info__ >= (0, 11):
            from jax.experimental.pallas import triton

            assert triton.get_gpu_info().arch_name == text


def test_a_card_that_pallas_does_not_know_is_refused():
    with (
        pytest.raises(ValueError, match=r"compute capability 7\.0 is not one of 8\.0, 8\.6"),
        _compat.lowering_for((7, 0)),
    ):
        pass


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Triton backend is deprecated from 0.11 on")
def test_the_one_named_exception_is_for_a_warning_that_is_given():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.clear_caches()
        lower(SCATTER)
    assert any("The Pallas Triton backend is deprecated" in str(warning.message) for warning in caught)


_ATOMICS = """
import sys
import jax
from pallas_kernels import _compat
from verify_kernels.cases import Case
from verify_kernels.compile import lower
if sys.argv[1] == "unknown":
    _compat.TRIED = ()
with _compat.triton_context() as context:
    from jaxlib.mlir import ir
    print(ir.Module.parse(lower(Case(kernel="scatter", m=32, shape=(64, 64), g=4, n=256)).bytecode))
"""


@pytest.mark.long
@pytest.mark.parametrize(("release", "order"), [("installed", "relaxed"), ("unknown", "acq_rel")])
def test_atomic_additions_lose_their_fences_only_under_a_release_that_was_tried(release, order):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _ATOMICS, release], env=environment, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if "tt.atomic_rmw" in line]
    assert f"fadd, {order}, gpu" in line
    assert ("keeps a fence for each" in done.stderr) == (release == "unknown")


def test_only_the_kernel_that_is_named_is_touched():
    accesses = read_accesses(*(lambda lowered: (lowered.bytecode, lowered.grid))(lower(SCATTER)))
    assert [access.kind for access in accesses].count("atomic_rmw") == 1
