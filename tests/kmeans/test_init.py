"""The start of k-means: codes as dense as theory wants them, none twice, and a lower error for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.kmeans.assignment import Blocks
from cluscomp_jax.kmeans.init import draw_sample, init_codebook


def start(vectors: np.ndarray, n: int, *, seed: int = 0, weights: np.ndarray | None = None) -> np.ndarray:
    mass = jnp.ones(len(vectors)) if weights is None else jnp.asarray(weights, jnp.float32)
    key, blocks = jax.random.key(seed), Blocks(jnp.asarray(vectors)[None], mass[None])
    sample, mass = draw_sample(blocks, key, num_codes=n, count=len(vectors))
    return np.asarray(init_codebook(sample, mass, key, num_codes=n))


def error_after_lloyd(vectors: np.ndarray, codebook: np.ndarray, iterations: int) -> float:
    """Mean squared error after float64 Lloyd iterations; empty clusters stay where they are."""
    codebook = codebook.astype(np.float64)
    for _ in range(iterations + 1):
        distances = (vectors**2).sum(1)[:, None] - 2 * vectors @ codebook.T + (codebook**2).sum(1)
        index = distances.argmin(1)
        error = np.mean((vectors - codebook[index]) ** 2)
        for code in np.unique(index):
            codebook[code] = vectors[index == code].mean(0)
    return float(error)


@pytest.mark.parametrize(("m", "n", "g"), [(2, 1, 1), (20, 19, 2), (100, 99, 4), (1000, 40, 9), (999, 60, 3)])
def test_codes_are_distinct_vectors_of_the_data(m: int, n: int, g: int) -> None:
    vectors = np.random.default_rng(m).standard_normal((m, g)).astype(np.float32)
    codes = start(vectors, n)
    rows = {row.tobytes() for row in vectors}
    assert codes.shape == (n, g)
    assert all(code.tobytes() in rows for code in codes)
    assert len(np.unique(codes, axis=0)) >= n - 1  # rounding may pick a vector twice


def test_it_ends_below_a_uniformly_drawn_start_on_heavy_tails() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_t(4, (8000, 3))
    uniform = vectors[rng.permutation(8000)[:400]]
    spread = start(vectors.astype(np.float32), 400)
    assert error_after_lloyd(vectors, spread, 8) < 0.9 * error_after_lloyd(vectors, uniform, 8)


def test_density_is_the_vectors_density_to_the_power_of_theory() -> None:
    # Two boxes of equal volume, one with 27 times the vectors: in three dimensions 27^(3/5) = 7.2 times the codes.
    rng = np.random.default_rng(1)
    vectors = rng.uniform(size=(28000, 3)).astype(np.float32)
    vectors[:1000, 0] += 5
    sparse = sum(float(np.mean(start(vectors, 700, seed=seed)[:, 0] > 4)) for seed in range(5)) / 5
    assert sparse == pytest.approx(1 / (1 + 27 ** (3 / 5)), rel=0.25)  # uniformly drawn: 1 / 28


def test_weights_count_as_density() -> None:
    vectors = np.random.default_rng(2).uniform(size=(20000, 2)).astype(np.float32)
    heavy = vectors[:, 0] > 0.5
    codes = start(vectors, 600, weights=np.where(heavy, 16.0, 1.0))
    # 16^(2/4) = 4 times as dense where the weight is.
    assert np.mean(codes[:, 0] > 0.5) == pytest.approx(0.8, abs=0.04)


def test_a_crowd_of_equal_vectors_gets_a_code() -> None:
    rng = np.random.default_rng(3)
    vectors = np.concatenate([np.full((5000, 4), 7.0), rng.standard_normal((5000, 4))]).astype(np.float32)
    codes = start(rng.permutation(vectors), 200)
    assert (codes == 7.0).all(1).any()


def test_padding_is_never_drawn() -> None:
    vectors = np.random.default_rng(4).standard_normal((96, 2)).astype(np.float32)
    blocks = Blocks(jnp.asarray(np.where(np.arange(96)[:, None] < 90, vectors, 1e6))[None], jnp.ones((1, 96)))
    sample, _ = draw_sample(blocks, jax.random.key(0), num_codes=80, count=90)
    assert sample.shape == (90, 2)
    assert np.abs(sample).max() < 1e6
