"""The correction for drifted inputs against ridge regression written out in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.clustering.drift_correction import LayerStatistics
from cluscomp_jax.clustering.drift_correction import corrected as corrected_of_all


def corrected(weight, statistics, *, ridge):
    (moved,) = corrected_of_all([weight], statistics, ridge=ridge)
    return moved


def drifted(*, residual: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weight [12, 7], inputs now and originally [400, 12], and what the outputs lack [400, 7]."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 7)).astype(np.float32)
    x0 = rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12))
    x = x0 @ (np.eye(12) + 0.2 * rng.standard_normal((12, 12))) + 0.1 * rng.standard_normal((400, 12))
    lacking = (x0 - x) @ weight
    if residual:
        lacking = lacking + 0.5 * x0[:, :7]
    return weight, x, x0, lacking


def statistics_of(x: np.ndarray, x0: np.ndarray, lacking: np.ndarray, *, residual: bool) -> LayerStatistics:
    inputs = jnp.asarray(x.T @ x / len(x), jnp.float32)
    if residual:
        return LayerStatistics(inputs, errors=jnp.asarray(x.T @ lacking / len(x), jnp.float32))
    return LayerStatistics(inputs, drift=jnp.asarray(x.T @ (x0 - x) / len(x), jnp.float32))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("ridge", [1e-4, 0.3, 1e6])
def test_it_is_the_ridge_regression_of_what_the_outputs_lack(ridge: float, residual: bool) -> None:
    weight, x, x0, lacking = drifted(residual=residual)
    moved = np.asarray(corrected(jnp.asarray(weight), statistics_of(x, x0, lacking, residual=residual), ridge=ridge))
    strength = np.sqrt(ridge * np.mean(np.square(x)) * len(x))
    stacked = np.concatenate([x, strength * np.eye(12)])  # ridge regression as plain least squares with 12 rows more
    change, *_ = np.linalg.lstsq(stacked, np.concatenate([lacking, np.zeros((12, 7))]), rcond=None)
    np.testing.assert_allclose(moved - weight, change, rtol=2e-3, atol=2e-3)
    if ridge < 1:
        before, after = (np.mean(np.square(lacking - x @ (w - weight))) for w in (weight, moved))
        assert after < 0.7 * before


def test_a_stream_that_has_not_drifted_changes_nothing() -> None:
    weight, x, _, lacking = drifted(residual=False)
    moved = corrected(jnp.asarray(weight), statistics_of(x, x, 0 * lacking, residual=False), ridge=0.3)
    np.testing.assert_array_equal(moved, weight)


def test_dead_inputs_keep_the_weights() -> None:
    weight = drifted(residual=False)[0]
    nothing = LayerStatistics(jnp.zeros((12, 12)), drift=jnp.zeros((12, 12)))
    np.testing.assert_array_equal(corrected(jnp.asarray(weight), nothing, ridge=0.3), weight)


@pytest.mark.nans
def test_a_ridge_that_is_too_little_is_raised_and_a_hessian_of_nan_is_refused() -> None:
    weight = drifted(residual=False)[0]
    few = np.random.default_rng(1).standard_normal((3, 12)).astype(np.float32) * 1e3  # of rank 3
    statistics = LayerStatistics(jnp.asarray(few.T @ few / 3), drift=jnp.asarray(-0.5 * few.T @ few / 3))
    moved, expected = (corrected(jnp.asarray(weight), statistics, ridge=ridge) for ridge in (1e-9, 1e-4))
    assert np.linalg.norm(moved - weight) > 0.1
    np.testing.assert_allclose(few @ moved, few @ expected, rtol=1e-2, atol=1.0)
    broken = LayerStatistics(jnp.full((12, 12), jnp.nan), errors=jnp.zeros((12, 7)))
    with pytest.raises(FloatingPointError, match=r"12 channels has no Cholesky root even with a ridge of 3000\.0"):
        corrected(jnp.asarray(weight), broken, ridge=0.3)
