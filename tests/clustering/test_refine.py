"""Refitting against coordinate descent and least squares written out in NumPy, and what it may never do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.clustering import refine as refit_module
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.error_feedback import assign_with_error_feedback, factor_hessian
from cluscomp_jax.clustering.refine import curvature_of, reassign_codes, refine, update_codebook
from cluscomp_jax.kmeans import assign, build_code_index
from pallas_kernels.implementation import IMPLEMENTATION

KEY = jax.random.key(0)


def problem(i: int, o: int, g: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [i, o], codes [n, g] and second moments [i, i] of inputs that go together."""
    rng = np.random.default_rng(i)
    mixing = rng.standard_normal((i, i)) * np.exp(rng.standard_normal(i))[:, None]
    inputs = rng.standard_normal((4 * i, i)) @ mixing
    weight = rng.standard_normal((i, o)).astype(np.float32)
    return weight, rng.standard_normal((n, g)).astype(np.float32), (inputs.T @ inputs / len(inputs)).astype(np.float32)


def damped(moments: np.ndarray) -> np.ndarray:
    return moments.astype(np.float64) + 0.01 * np.mean(np.diag(moments)) * np.eye(len(moments))


def decoded(codes: np.ndarray, index: np.ndarray, outputs: int) -> np.ndarray:
    return np.asarray(codes, np.float64)[np.asarray(index)].reshape(len(index), -1)[:, :outputs]


def output_error(
    weight: np.ndarray, codes: np.ndarray, index: np.ndarray, moments: np.ndarray, masses: np.ndarray | float = 1.0
) -> float:
    error = weight - decoded(codes, index, weight.shape[1])
    return float(np.einsum("io,ij,jo->", error * masses, damped(moments), error))


def descend(weight: np.ndarray, codes: np.ndarray, index: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """One round over the channels, each trying all codes at every place and keeping the one of least output error."""
    moments, index, g = damped(moments), index.copy(), codes.shape[1]
    for i in np.argsort(np.diag(moments))[::-1]:
        for j in range(index.shape[1]):
            cut = slice(j * g, min((j + 1) * g, weight.shape[1]))
            width = cut.stop - cut.start
            error = weight[:, cut] - decoded(codes, index[:, j : j + 1], width)
            others = moments[i] @ error - moments[i, i] * error[i]
            own = weight[i, cut] - codes[:, :width].astype(np.float64)
            gain = moments[i, i] * (own**2).sum(1) + 2 * own @ others
            index[i, j] = np.argmin(gain)
    return index


@pytest.mark.parametrize("i", [20, 300])
def test_a_curvature_in_blocks_is_the_damped_hessian(i: int) -> None:
    moments = problem(i, 4, 2, 4)[2]
    factor = factor_hessian(jnp.asarray(moments))
    with IMPLEMENTATION("interpret"):
        order, hessian = curvature_of(factor)
    expected = damped(moments)[np.ix_(order, order)]
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(np.asarray(hessian) / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("i", "o", "g"), [(40, 24, 4), (140, 12, 4), (130, 10, 4), (1, 8, 2), (7, 3, 9)])
def test_a_round_is_coordinate_descent(i: int, o: int, g: int) -> None:
    weight, codes, moments = problem(i, o, g, 16)
    factor = factor_hessian(jnp.asarray(moments))
    index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
    index, curvature = np.asarray(index), curvature_of(factor)
    better = reassign_codes(jnp.asarray(weight), jnp.asarray(codes), jnp.asarray(index), curvature, NearestCodes())
    expected = descend(weight, codes, index, moments)
    assert better.shape == index.shape
    assert np.mean(np.asarray(better) == expected) > 0.98  # a vector between two codes may go to either


@pytest.mark.parametrize(("outputs", "g", "tie_codebooks"), [(64, 4, 0.95), (65, 8, 0.96), (25, 4, 0.96)])
def test_rounds_lower_the_output_error_until_nothing_moves(outputs: int, g: int, tie_codebooks: float) -> None:
    weight, codes, moments = problem(150, outputs, g, 64)
    factor = factor_hessian(jnp.asarray(moments))
    index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
    codes, errors = jnp.asarray(codes), [output_error(weight, codes, index, moments)]
    for _ in range(4):
        codes, index = refine(jnp.asarray(weight), codes, index, factor, NearestCodes(), rounds=1, key=KEY)
        errors.append(output_error(weight, np.asarray(codes), index, moments))
    assert errors[1] < tie_codebooks * errors[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    same, kept = refine(jnp.asarray(weight), codes, index, factor, NearestCodes(), rounds=0, key=KEY)
    np.testing.assert_array_equal(same, codes)
    np.testing.assert_array_equal(kept, index)


@pytest.mark.parametrize(("outputs", "at_once"), [(32, 4096), (30, 4096), (28, 8), (26, 12)])
def test_the_codebook_tends_to_the_least_squares_solution(
    outputs: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit_module, "_OUTPUTS", at_once)
    weight, codes, moments = problem(60, outputs, 4, 12)
    curvature = curvature_of(factor_hessian(jnp.asarray(moments)))
    index = np.random.default_rng(0).integers(0, 11, (60, -(-outputs // 4)))  # the last code stands nowhere
    solved, masses = jnp.asarray(codes), np.ones(outputs)
    if outputs == 30:
        masses = np.random.default_rng(1).uniform(0.2, 4, outputs)
    for _ in range(40):
        solved = update_codebook(
            jnp.asarray(weight), solved, jnp.asarray(index), curvature, jnp.asarray(masses, jnp.float32)
        )
    root = np.linalg.cholesky(damped(moments)).T
    columns = []
    for place in range(12 * 4):
        unit = np.zeros(12 * 4)
        unit[place] = 1.0
        columns.append((root @ decoded(unit.reshape(12, 4), index, outputs) * np.sqrt(masses)).reshape(-1))
    target = (root @ weight.astype(np.float64) * np.sqrt(masses)).reshape(-1)
    best = np.linalg.lstsq(np.stack(columns, 1), target, rcond=None)[0]
    np.testing.assert_allclose(np.asarray(solved)[:11], best.reshape(12, 4)[:11], atol=2e-3)
    np.testing.assert_array_equal(solved[11], codes[11])
    least = output_error(weight, best.reshape(12, 4), index, moments, masses)
    assert output_error(weight, np.asarray(solved), index, moments, masses) <= least * (1 + 1e-4)


def test_channels_that_are_never_active_do_no_harm() -> None:
    weight, codes, moments = problem(30, 16, 4, 20)
    moments[5] = moments[:, 5] = 0
    for given in (moments, np.zeros_like(moments)):
        factor = factor_hessian(jnp.asarray(given))
        index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
        solved, index = refine(
            jnp.asarray(weight), jnp.asarray(codes), index, factor, NearestCodes(), rounds=2, key=KEY
        )
        assert np.isfinite(solved).all()
        alone, _ = assign(jnp.asarray(weight[5].reshape(-1, 4)), jnp.asarray(codes))
        once = reassign_codes(
            jnp.asarray(weight), jnp.asarray(codes), jnp.zeros_like(index), curvature_of(factor), NearestCodes()
        )
        np.testing.assert_array_equal(once[5], alone)  # it answers for no other channel


def test_many_codes_are_refitted_by_their_trees() -> None:
    """Three trees for each vector, planted anew where the codebook has moved, end where comparing all codes does."""
    weight, codes, moments = problem(64, 64, 1, 1100)
    factor = factor_hessian(jnp.asarray(moments))
    code_index = build_code_index(jnp.asarray(codes), KEY)
    assert code_index is not None
    errors = []
    for trees in (code_index, None):
        index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes(trees))
        start = output_error(weight, codes, index, moments)
        solved, index = jnp.asarray(codes), index
        if trees is None:
            for _ in range(2):
                index = reassign_codes(jnp.asarray(weight), solved, index, curvature_of(factor), NearestCodes())
                solved = update_codebook(jnp.asarray(weight), solved, index, curvature_of(factor))
        else:
            solved, index = refine(jnp.asarray(weight), solved, index, factor, NearestCodes(trees), rounds=2, key=KEY)
        errors.append(output_error(weight, np.asarray(solved), index, moments))
        assert errors[-1] < start
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_a_single_code_is_solved_for_and_stays() -> None:
    """Conjugate gradients end in one step here; more of them have nothing left to divide."""
    for seed in range(8):
        weight, codes, moments = problem(16 + seed, 24, 4, 1)
        index = jnp.zeros((16 + seed, 6), jnp.int32)
        factor = factor_hessian(jnp.asarray(moments))
        solved, _ = refine(jnp.asarray(weight), jnp.asarray(codes), index, factor, NearestCodes(), rounds=10, key=KEY)
        once, _ = refine(jnp.asarray(weight), jnp.asarray(codes), index, factor, NearestCodes(), rounds=1, key=KEY)
        np.testing.assert_allclose(solved, once, atol=2e-2)
