"""Walks of trellis paths, interpreted, against dynamic programming over all codes in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.code_walk.config import PathConfig, path_config
from pallas_kernels.code_walk.trellis import search_segments, walk_trellis


def least_error(target, table, step_bits, counts):
    """Returns the least squared error of any path along a target [c, g], by a step over all pairs of codes."""
    n = len(table)
    codes = np.arange(n)
    follows = (codes[:, None] >> step_bits) == (codes[None] & ((n >> step_bits) - 1))  # [before, after]
    error = np.zeros(n)
    for t in range(len(target)):
        if t:
            error = np.where(follows, error[:, None], np.inf).min(axis=0)
        error = error + np.sum((target[t] - table) ** 2 * counts[t], axis=1)
    return error.min()


def problem(seed, rows, c, g, window):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((rows, c * g))
    arrays = base, base + 0.1 * rng.standard_normal(base.shape), 0.3 * rng.standard_normal((rows, rows))
    return [np.asarray(array, np.float32) for array in (*arrays, rng.standard_normal((1 << window, g)))]


CASES = {
    "several strips": (3, 70, 2, 6, 2, PathConfig(steps=16, margin=12)),
    "more bits than a head has": (2, 41, 2, 6, 4, PathConfig(steps=8, margin=8)),
    "one weight": (3, 50, 1, 5, 3, PathConfig(steps=8, margin=8)),
    "one strip": (2, 10, 2, 6, 4, PathConfig(steps=16, margin=4)),
    "every bit is new": (2, 20, 2, 3, 3, PathConfig(steps=4, margin=4)),
}


@pytest.mark.parametrize("even", [True, False], ids=["even", "weighted"])
@pytest.mark.parametrize("case", CASES)
def test_every_channel_takes_the_path_of_least_error(case, even):
    rows, c, g, window, step_bits, tile = CASES[case]
    arrays, outputs = problem(len(case), rows, c, g, window), c * g - (g > 1)
    counts = np.where(np.arange(c * g) < outputs, 1.0 if even else np.random.default_rng(c).uniform(0.1, 8, c * g), 0)
    given = (*map(jnp.asarray, arrays), jnp.asarray(counts, jnp.float32))
    found = walk_trellis(*given, step_bits=step_bits, tile=tile, interpret=True)
    codes, delta = (np.asarray(array) for array in found)
    base, value, weights, table = (array.astype(np.float64) for array in arrays)
    np.testing.assert_array_equal(codes[:, :-1] >> step_bits, codes[:, 1:] & ((1 << window - step_bits) - 1))
    np.testing.assert_allclose(delta, value - table[codes].reshape(rows, -1), atol=1e-6)
    counts = counts.reshape(c, g)
    for i in range(rows):
        target = (base[i] + weights[i, i + 1 :] @ delta[i + 1 :]).reshape(c, g)
        error = np.sum((target - table[codes[i]]) ** 2 * counts)
        assert error <= least_error(target, table, step_bits, counts) * (1 + 1e-5)


def test_strips_hold_a_window_and_large_codebooks_have_none():
    for step_bits in range(1, 13):
        tile = path_config(4096, 2, 12, step_bits)
        assert tile.steps * step_bits >= 12
        assert tile.margin * step_bits >= 12
    assert path_config(4096, 1, 16, 4) is None


@pytest.mark.parametrize("even", [True, False], ids=["even", "weighted"])
def test_every_segment_takes_the_path_of_least_error(even):
    *_, table = problem(1, 1, 1, 2, 5)
    segments = np.random.default_rng(2).standard_normal((4, 9, 2)).astype(np.float32)
    counts = np.ones(segments.shape) if even else np.random.default_rng(3).uniform(0.1, 8, segments.shape)
    arrays = (jnp.asarray(segments), jnp.asarray(table), None if even else jnp.asarray(counts, jnp.float32))
    codes = np.asarray(search_segments(*arrays, step_bits=2, num_warps=4, interpret=True))
    np.testing.assert_array_equal(codes[:, :-1] >> 2, codes[:, 1:] & 7)
    for segment, path, own in zip(segments.astype(np.float64), codes, counts, strict=True):
        least = least_error(segment, table.astype(np.float64), 2, own)
        assert np.sum((segment - table[path]) ** 2 * own) <= least * (1 + 1e-5)
