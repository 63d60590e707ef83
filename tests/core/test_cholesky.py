"""The root of many channels against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.core import cholesky as module
from cluscomp_jax.core.cholesky import blocked_cholesky


def moments(i: int) -> np.ndarray:
    inputs = np.random.default_rng(i).standard_normal((3 * i, i))
    return inputs.T @ inputs / (3 * i)


@pytest.mark.parametrize("i", [1, 11, 24, 25, 31])
def test_panels_give_the_root_of_the_whole(i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.asarray(blocked_cholesky(jnp.asarray(moments(i), jnp.float32)))
    monkeypatch.setattr(module, "_WHOLE", 10)
    monkeypatch.setattr(module, "_PANEL", 8)
    lower = np.tril(moments(i)) + np.triu(np.full((i, i), 7.0), 1)  # what is above the diagonal is not read
    root = np.asarray(jax.jit(blocked_cholesky)(jnp.asarray(lower, jnp.float32)))
    np.testing.assert_allclose(root, np.linalg.cholesky(moments(i)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(root, whole, rtol=1e-4, atol=1e-5)
    assert not np.triu(root, 1).any()


@pytest.mark.nans
def test_a_matrix_that_has_no_root_shows_on_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WHOLE", 10)
    monkeypatch.setattr(module, "_PANEL", 8)
    indefinite = jnp.asarray(moments(24), jnp.float32).at[12, 12].set(-1.0)
    assert not np.isfinite(np.diagonal(blocked_cholesky(indefinite))).all()
