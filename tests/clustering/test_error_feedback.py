"""Error feedback against optimal brain quantisation written out, its corner cases, and what it buys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.clustering import error_feedback
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.error_feedback import assign_with_error_feedback, factor_hessian
from cluscomp_jax.kmeans import assign


def problem(i: int, o: int, g: int, n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [i, o], codes [n, g] and second moments [i, i] of inputs that go together."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((i, i)) * np.exp(rng.standard_normal(i))[:, None]
    inputs = rng.standard_normal((4 * i, i)) @ mixing
    weight = rng.standard_normal((i, o)).astype(np.float32)
    codes = rng.standard_normal((n, g)).astype(np.float32)
    return weight, codes, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def decode(codes: np.ndarray, index: jax.Array, outputs: int) -> np.ndarray:
    return codes[np.asarray(index)].reshape(index.shape[0], -1)[:, :outputs].astype(np.float64)


def output_error(weight: np.ndarray, decoded: np.ndarray, moments: np.ndarray) -> float:
    error = weight - decoded
    return float(np.einsum("io,ij,jo->", error, moments.astype(np.float64), error))


def brain_quantise(weight: np.ndarray, codes: np.ndarray, moments: np.ndarray, order: np.ndarray, g: int) -> np.ndarray:
    """Codes by OBQ: after each channel the inverse of what is left is downdated, as its authors have it."""
    moments = moments.astype(np.float64)[np.ix_(order, order)]
    inverse = np.linalg.inv(moments + 0.01 * np.mean(np.diag(moments)) * np.eye(len(order)))
    left, index = weight.astype(np.float64)[order], []
    for k in range(len(order)):
        pieces = [left[k, j : j + g] for j in range(0, len(left[k]), g)]
        index.append(np.array([((piece - codes[:, : len(piece)]) ** 2).sum(-1).argmin() for piece in pieces]))
        error = left[k] - codes[index[-1]].reshape(-1)[: len(left[k])]
        left[k + 1 :] -= np.outer(inverse[1:, 0] / inverse[0, 0], error)
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return np.stack(index)[back]


@pytest.mark.parametrize(("i", "o", "g"), [(40, 24, 4), (150, 20, 5), (130, 22, 4), (1, 8, 2), (7, 3, 9)])
def test_codes_are_those_of_optimal_brain_quantisation(i: int, o: int, g: int) -> None:
    weight, codes, moments = problem(i, o, g, 32)
    factor = factor_hessian(jnp.asarray(moments))
    index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
    order = np.asarray(factor.act_order)
    assert np.all(np.diff(np.diag(moments)[order]) >= 0)
    expected = brain_quantise(weight, codes, moments, order[::-1], g)
    assert index.shape == (i, -(-o // g))
    # A vector between two codes may round to either, and what comes after it then differs.
    assert np.mean(np.asarray(index) == expected) > 0.98


def test_codes_are_the_same_where_products_begin_with_the_part_of_the_channels(monkeypatch) -> None:
    weight, codes, moments = problem(140, 21, 4, 32)
    factor = factor_hessian(jnp.asarray(moments))
    monkeypatch.setattr(error_feedback, "_BLOCK_SIZE", 8)
    lengths, added = set(), error_feedback._added

    def watched(begin, columns, errors):
        lengths.add(len(errors) - begin)
        return added(begin, columns, errors)

    monkeypatch.setattr(error_feedback, "_added", watched)
    jax.clear_caches()
    index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
    assert sorted(lengths) == [24, 64, 104, 144]  # 18 blocks of 8 channels, 5 of them in a part
    expected = brain_quantise(weight, codes, moments, np.asarray(factor.act_order)[::-1], 4)
    assert np.mean(np.asarray(index) == expected) > 0.98
    jax.clear_caches()


def test_the_output_error_falls() -> None:
    weight, codes, moments = problem(100, 64, 4, 64)
    factor = factor_hessian(jnp.asarray(moments))
    index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
    nearest, _ = assign(jnp.asarray(weight.reshape(-1, 4)), jnp.asarray(codes))
    fed, blind = (output_error(weight, decode(codes, ix, 64), moments) for ix in (index, nearest.reshape(100, -1)))
    assert fed < 0.6 * blind


def test_the_root_is_that_of_the_shrunk_and_damped_moments() -> None:
    _, _, moments = problem(30, 8, 4, 32)
    factor = factor_hessian(jnp.asarray(moments), damping=0.02, shrinkage=0.3)
    order, root = np.asarray(factor.act_order), np.asarray(factor.root, np.float64)
    wanted = moments.astype(np.float64)
    wanted *= np.where(np.eye(30, dtype=bool), 1.0, 0.7)
    wanted += 0.02 * np.diag(moments).mean() * np.eye(30)
    tolerance = 30 * np.finfo(np.float32).eps * np.abs(wanted).max()
    np.testing.assert_allclose(root @ root.T, wanted[np.ix_(order, order)], atol=tolerance)


def test_shrinking_moments_of_few_samples_lowers_the_error_on_others() -> None:
    weight, codes, _ = problem(96, 64, 4, 64)
    rng = np.random.default_rng(3)
    mixed = rng.standard_normal((96, 96)) * np.exp(rng.standard_normal(96))
    seen = rng.standard_normal((48, 96)) @ mixed
    moments = (seen.T @ seen / len(seen)).astype(np.float32)
    errors = []
    for shrinkage in (0.0, 0.2):
        factor = factor_hessian(jnp.asarray(moments), shrinkage=shrinkage)
        index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
        errors.append(output_error(weight, decode(codes, index, 64), mixed.T @ mixed))
    assert errors[1] < 0.95 * errors[0]


def test_moments_without_correlation_give_the_nearest_codes() -> None:
    weight, codes, _ = problem(30, 16, 4, 20)
    factor = factor_hessian(jnp.diag(jnp.arange(1.0, 31.0)))
    index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes())
    nearest, _ = assign(jnp.asarray(weight.reshape(-1, 4)), jnp.asarray(codes))
    np.testing.assert_array_equal(index, nearest.reshape(30, -1))


def test_channels_that_are_never_active_change_nothing() -> None:
    weight, codes, moments = problem(30, 16, 4, 20)
    moments[5] = moments[:, 5] = 0
    index = assign_with_error_feedback(
        jnp.asarray(weight), jnp.asarray(codes), factor_hessian(jnp.asarray(moments)), NearestCodes()
    )
    nearest, _ = assign(jnp.asarray(weight[5].reshape(-1, 4)), jnp.asarray(codes))
    np.testing.assert_array_equal(index[5], nearest)
    all_dead = factor_hessian(jnp.zeros((30, 30)))
    index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), all_dead, NearestCodes())
    nearest, _ = assign(jnp.asarray(weight.reshape(-1, 4)), jnp.asarray(codes))
    np.testing.assert_array_equal(index, nearest.reshape(30, -1))


@pytest.mark.nans
def test_a_factorisation_that_fails_is_damped_more_and_one_that_cannot_says_so() -> None:
    rng = np.random.default_rng(0)
    few = rng.standard_normal((3, 50)).astype(np.float32)
    moments = few.T @ few - 0.05 * np.eye(50, dtype=np.float32)  # rounding can leave eigenvalues below zero
    assert np.isfinite(factor_hessian(jnp.asarray(moments)).root).all()
    with pytest.raises(FloatingPointError, match="50 channels"):
        factor_hessian(jnp.full((50, 50), jnp.nan))
