"""Viterbi's algorithm against all paths there are, and against a float64 dynamic programme over all transitions."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.trellis.viterbi import Trellis, best_path, best_paths


def is_stream(codes: np.ndarray, trellis: Trellis) -> bool:
    """Whether the low bits of every code are the high bits of the one before it."""
    return bool(np.all(codes[1:] & (trellis.heads - 1) == codes[:-1] >> trellis.step_bits))


def error(target: np.ndarray, codebook: np.ndarray, codes: np.ndarray, outputs: int | None = None) -> float:
    squares = np.square(target.astype(np.float64) - codebook.astype(np.float64)[codes].reshape(-1))
    return float(squares[:outputs].sum())


def least_error(target: np.ndarray, codebook: np.ndarray, trellis: Trellis) -> float:
    """The least error of any stream: a table [from code, to code] of what may follow, no minimum shared."""
    n, g = codebook.shape
    codes = np.arange(n)
    follows = (codes[:, None] >> trellis.step_bits) == (codes[None] & (trellis.heads - 1))
    costs = np.zeros(n)
    for step, vector in enumerate(target.astype(np.float64).reshape(-1, g)):
        if step:
            costs = np.where(follows, costs[:, None], np.inf).min(axis=0)
        costs = costs + np.square(vector - codebook.astype(np.float64)).sum(axis=1)
    return float(costs.min())


def problem(trellis: Trellis, c: int, g: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(c * g, np.float32), rng.standard_normal((trellis.num_codes, g), np.float32)


def test_no_stream_of_all_is_nearer() -> None:
    trellis, g, c = Trellis(3, 2), 2, 5
    target, codebook = problem(trellis, c, g, 0)
    streams = []
    for first in range(8):
        for added in itertools.product(range(4), repeat=c - 1):
            codes = [first]
            for k in added:
                codes.append((codes[-1] >> 2) | (k << 1))
            streams.append(codes)
    best = min(streams, key=lambda codes: error(target, codebook, np.array(codes)))
    np.testing.assert_array_equal(best_path(jnp.asarray(target), jnp.asarray(codebook), trellis, lanes=1), best)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_error_is_the_least_and_the_codes_are_a_stream(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 7))
    trellis = Trellis(window, data.draw(st.integers(1, window)))
    c, g = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    target, codebook = problem(trellis, c, g, data.draw(st.integers(0, 99)))
    codes = np.asarray(best_path(jnp.asarray(target), jnp.asarray(codebook), trellis, lanes=1))
    assert codes.shape == (c,)
    assert is_stream(codes, trellis)
    # Sums of at most 48 squares in float32.
    assert error(target, codebook, codes) == pytest.approx(least_error(target, codebook, trellis), rel=1e-5)


@pytest.mark.parametrize(("window", "bits", "g", "c"), [(8, 4, 2, 288), (8, 2, 1, 300), (6, 6, 3, 64), (9, 3, 2, 530)])
def test_segments_lose_next_to_nothing_and_join(window: int, bits: int, g: int, c: int) -> None:
    trellis = Trellis(window, bits)
    target, codebook = problem(trellis, c, g, 1)
    whole = error(target, codebook, best_path(jnp.asarray(target), jnp.asarray(codebook), trellis, lanes=1))
    for lanes in (2, 4, 8):
        codes = np.asarray(best_path(jnp.asarray(target), jnp.asarray(codebook), trellis, lanes=lanes))
        assert is_stream(codes, trellis)
        assert whole * (1 - 1e-5) <= error(target, codebook, codes) <= 1.02 * whole


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("c", [1, 3, 4, 9])
def test_few_steps(lanes: int, c: int) -> None:
    trellis = Trellis(6, 2)
    target, codebook = problem(trellis, c, 2, 2)
    codes = np.asarray(best_path(jnp.asarray(target), jnp.asarray(codebook), trellis, lanes=lanes))
    assert codes.shape == (c,)
    assert is_stream(codes, trellis)


def test_what_is_past_the_outputs_does_not_count() -> None:
    trellis = Trellis(6, 3)
    target, codebook = problem(trellis, 40, 3, 3)
    far = target.copy()
    far[118:] = 1e3
    outputs = {"weights": jnp.asarray(np.arange(120) < 118, jnp.float32), "lanes": 1}
    codes = np.asarray(best_path(jnp.asarray(far), jnp.asarray(codebook), trellis, **outputs))
    np.testing.assert_array_equal(codes, best_path(jnp.asarray(target), jnp.asarray(codebook), trellis, **outputs))
    # Streams that differ in the last code alone cannot be nearer by what counts.
    last = codes[-1]
    for k in range(trellis.tails):
        other = codes.copy()
        other[-1] = (k << 3) | (last & (trellis.heads - 1))
        assert error(target, codebook, other, 118) >= error(target, codebook, codes, 118) * (1 - 1e-6)


@pytest.mark.parametrize("lanes", [1, 4])
def test_errors_count_by_their_weights(lanes: int) -> None:
    """Of whole numbers, a squared error that counts k times is that of k targets in a vector of k times the weights."""
    trellis, repeats = Trellis(6, 2), np.random.default_rng(5).integers(1, 4, 90)
    target, codebook = problem(trellis, 90, 1, 5)
    weighted = best_path(
        jnp.asarray(target), jnp.asarray(codebook), trellis, weights=jnp.asarray(repeats, jnp.float32), lanes=lanes
    )
    assert is_stream(np.asarray(weighted), trellis)
    counted = jnp.asarray((np.arange(3) < repeats[:, None]).astype(np.float32).ravel())
    copies = jnp.asarray(np.repeat(target, 3)), jnp.asarray(np.repeat(codebook, 3, axis=1))
    np.testing.assert_array_equal(weighted, best_path(*copies, trellis, weights=counted, lanes=lanes))
    assert not np.array_equal(weighted, best_path(jnp.asarray(target), jnp.asarray(codebook), trellis, lanes=lanes))


def test_lanes_are_channels_of_their_own() -> None:
    trellis = Trellis(7, 3)
    rng = np.random.default_rng(4)
    targets, codebook = rng.standard_normal((20, 2, 8), np.float32), rng.standard_normal((128, 2), np.float32)
    codes = np.asarray(best_paths(jnp.asarray(targets), jnp.asarray(codebook), trellis))
    for lane in range(8):
        alone = best_path(jnp.asarray(targets[:, :, lane].reshape(-1)), jnp.asarray(codebook), trellis, lanes=1)
        np.testing.assert_array_equal(codes[:, lane], alone)
