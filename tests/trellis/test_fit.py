"""The codebook of a trellis: what its rounds gain, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.trellis.fit import best_codes, fit_codebook
from cluscomp_jax.trellis.viterbi import Trellis

KEY = jax.random.key(3)


def relative_error(lines: np.ndarray, codebook: jax.Array, trellis: Trellis) -> float:
    codes = np.asarray(best_codes(jnp.asarray(lines), codebook, trellis=trellis))
    np.testing.assert_array_equal(codes[:, 1:] & (trellis.heads - 1), codes[:, :-1] >> trellis.step_bits)
    return float(np.square(lines - np.asarray(codebook)[codes]).sum() / np.square(lines).sum())


def gaussian(r: int, c: int, g: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((r, c, g), np.float32)


def test_rounds_lower_the_error_below_that_of_any_codes_without_memory() -> None:
    """At 2 bits a weight no scalar quantiser of a Gaussian is below 0.1175 (Max, 1960); its bound is 0.0625."""
    trellis, lines = Trellis(8, 4), gaussian(64, 96, 2)
    errors = [
        relative_error(lines, fit_codebook(jnp.asarray(lines), trellis, key=KEY, rounds=n), trellis) for n in (0, 20)
    ]
    assert 0.0625 < errors[1] < 0.95 * errors[0]
    assert errors[1] < 0.085


def test_lines_of_more_weight_are_nearer() -> None:
    trellis, lines = Trellis(6, 3), gaussian(32, 64, 2)
    lines[16:] += 4.0
    weights = np.where(np.arange(32) < 16, 1e-4, 1.0).astype(np.float32)
    codebook = fit_codebook(jnp.asarray(lines), trellis, key=KEY, weights=jnp.asarray(weights))
    even = fit_codebook(jnp.asarray(lines), trellis, key=KEY)
    assert relative_error(lines[16:], codebook, trellis) < 0.9 * relative_error(lines[16:], even, trellis)


def test_places_of_more_weight_are_nearer() -> None:
    """In its rounds and when codes are chosen, places with most of the weight take freedom from those between them."""
    trellis, lines = Trellis(7, 2), gaussian(64, 96, 1)
    heavy = np.arange(96) % 2 == 0
    places = jnp.asarray(np.where(heavy, 1.0, 0.05).astype(np.float32)[:, None])
    codebook = fit_codebook(jnp.asarray(lines), trellis, key=KEY, place_weights=places)
    even = fit_codebook(jnp.asarray(lines), trellis, key=KEY)
    codes = best_codes(jnp.asarray(lines), codebook, places, trellis=trellis)
    errors = np.square(lines - np.asarray(codebook)[np.asarray(codes)]).mean((0, 2))
    assert errors[heavy].mean() < 0.7 * relative_error(lines, even, trellis) * np.square(lines).mean()
    assert errors[~heavy].mean() > errors[heavy].mean()


def test_same_key_same_codes() -> None:
    trellis, lines = Trellis(6, 2), jnp.asarray(gaussian(9, 21, 1))
    first, again = (fit_codebook(lines, trellis, key=KEY, rounds=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = fit_codebook(lines, trellis, key=jax.random.key(4), rounds=3)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("r", "c"), [(1, 1), (3, 2), (1, 130), (17, 5)])
def test_few_vectors(r: int, c: int) -> None:
    trellis, lines = Trellis(8, 4), gaussian(r, c, 2)
    codebook = fit_codebook(jnp.asarray(lines), trellis, key=KEY, rounds=2)
    assert np.isfinite(codebook).all()
    assert best_codes(jnp.asarray(lines), codebook, trellis=trellis).shape == (r, c)


def test_dead_lines_and_a_constant_matrix_stay_finite() -> None:
    trellis = Trellis(6, 3)
    for lines in (np.zeros((8, 16, 2), np.float32), np.full((8, 16, 2), 0.5, np.float32)):
        codebook = fit_codebook(jnp.asarray(lines), trellis, key=KEY, rounds=3)
        codes = best_codes(jnp.asarray(lines), codebook, trellis=trellis)
        np.testing.assert_allclose(codebook[codes], lines, atol=1e-6)
