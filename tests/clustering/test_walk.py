"""Error feedback and refinement by the GPU kernels, interpreted, against the scans over channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.clustering.code_search import NearestCodes, NearestPath
from cluscomp_jax.clustering.error_feedback import assign_with_error_feedback, factor_hessian
from cluscomp_jax.clustering.refine import curvature_of, reassign_codes
from cluscomp_jax.clustering.walk import Rows
from cluscomp_jax.trellis.viterbi import Trellis
from pallas_kernels import implementation
from pallas_kernels._compat import lowering_for
from pallas_kernels.implementation import IMPLEMENTATION


def problem(i, o, g, n):
    """Returns (weight [i, o], codebook [n, g], Hessian [i, i] of inputs that go together)."""
    rng = np.random.default_rng(i)
    inputs = rng.standard_normal((4 * i, i)) @ rng.standard_normal((i, i)) * np.exp(rng.standard_normal(i))
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    weight, codebook = rng.standard_normal((i, o)), rng.standard_normal((n, g))
    return jnp.asarray(weight, jnp.float32), jnp.asarray(codebook, jnp.float32), jnp.asarray(hessian)


def both_passes(weight, codebook, hessian, search, how):
    factor = factor_hessian(hessian)
    with IMPLEMENTATION(how):
        codes = assign_with_error_feedback(weight, codebook, factor, search)
        return codes, reassign_codes(weight, codebook, codes, curvature_of(factor), search)


def output_error(weight, codebook, codes, hessian, masses=1.0):
    hessian = np.asarray(hessian, np.float64)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    quantized = np.asarray(codebook, np.float64)[np.asarray(codes)].reshape(len(codes), -1)[:, : weight.shape[1]]
    error = np.asarray(weight, np.float64) - quantized
    return float(np.einsum("io,ij,jo->", error * masses, damped, error))


@pytest.mark.parametrize(("i", "o", "g", "n"), [(140, 34, 4, 40), (20, 29, 2, 2500)], ids=["all codes", "trees"])
def test_the_kernel_chooses_the_codes_of_the_scan(i, o, g, n):
    weight, codebook, hessian = problem(i, o, g, n)
    search = NearestCodes().for_codebook(codebook, jax.random.key(0))
    assert (search.code_index is None) == (n < 100)
    expected, found = (both_passes(weight, codebook, hessian, search, how) for how in ("definition", "interpret"))
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == jnp.int32
        # A vector between two codes may go to either, and then moves all channels after it.
        assert np.mean(np.asarray(one) == np.asarray(other)) > 0.95
        errors = [output_error(weight, codebook, codes, hessian) for codes in (one, other)]
        assert errors[1] <= 1.0001 * errors[0]


@pytest.mark.parametrize("even", [True, False], ids=["even", "weighted"])
def test_paths_by_the_kernel_have_the_output_error_of_the_scan(even):
    weight, codebook, hessian = problem(10, 300, 2, 64)
    masses = np.ones(300) if even else np.random.default_rng(1).uniform(0.1, 8, 300)
    search = NearestPath(Trellis(6, 2), None if even else jnp.asarray(masses, jnp.float32))
    expected, found = (both_passes(weight, codebook, hessian, search, how) for how in ("definition", "interpret"))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(other[:, :-1] >> 2, other[:, 1:] & 15)
        errors = [output_error(weight, codebook, codes, hessian, masses) for codes in (one, other)]
        # Two searches of nearly the best paths part at the first tie; from there on channels have other errors.
        assert errors[1] <= 1.02 * errors[0]


def test_a_trellis_too_large_for_a_program_is_scanned():
    rows = Rows(*jnp.zeros((3, 2, 2)), None)
    assert NearestPath(Trellis(15, 2)).walk(rows, jnp.zeros((2**15, 1)), outputs=2, interpret=True) is None


def lowered(platform, search):
    weight, codebook, hessian = problem(20, 16, 4, 8)
    factor = factor_hessian(hessian)
    with lowering_for((8, 6)):
        traced = assign_with_error_feedback.trace(weight, codebook, factor, search)
        return traced.lower(lowering_platforms=(platform,)).as_text()


KERNELS = {NearestCodes(): "code_walk_nearest", NearestPath(Trellis(3, 2)): "code_paths"}


@pytest.mark.parametrize("search", KERNELS, ids=KERNELS.values())
def test_a_program_for_a_cuda_device_holds_the_kernel(search, monkeypatch):
    monkeypatch.setattr(implementation, "cuda_can_be_compiled", lambda: True)
    jax.clear_caches()
    assert KERNELS[search] in lowered("cuda", search)
    assert KERNELS[search] not in lowered("cpu", search)


def test_a_search_without_a_kernel_is_scanned(monkeypatch):
    class Plain:
        choose = NearestCodes.choose
        code_index = None

    monkeypatch.setattr(implementation, "cuda_can_be_compiled", lambda: True)
    jax.tree_util.register_pytree_node(Plain, lambda _: ((), None), lambda *_: Plain())
    assert "code_walk_nearest" not in lowered("cuda", Plain())
