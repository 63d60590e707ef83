"""Searching the lists of a tree: never worse than what was known, exact where it says so, sums as NumPy has them."""

import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.kmeans.assignment import Assignment, Blocks
from cluscomp_jax.kmeans.fit import fit_codebook, make_blocks
from cluscomp_jax.kmeans.probe_lists import make_probe_lists
from cluscomp_jax.kmeans.search import search_all, search_listed
from cluscomp_jax.kmeans.tree import grow_tree, random_rotation


def problem(m: int, n: int, g: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_t(5, (m, g)).astype(np.float32)
    return vectors, rng.exponential(1.0, m).astype(np.float32), vectors[rng.permutation(m)[:n]] + np.float32(0.01)


def squared_distances(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return ((vectors[:, None].astype(np.float64) - codes[None].astype(np.float64)) ** 2).sum(-1)


def listed(
    blocks: Blocks, codes: np.ndarray, *, length: int, previous: np.ndarray | None = None, turn: int = 0
) -> Assignment:
    tree = grow_tree(jnp.asarray(codes), random_rotation(jax.random.key(0), turn, g=codes.shape[1]))
    probe_lists = make_probe_lists(tree, jnp.asarray(codes), length=length)
    index = np.full(blocks.weights.shape, -1, np.int32) if previous is None else previous
    found: Assignment = search_listed(blocks, jnp.asarray(index), jnp.asarray(codes), tree, probe_lists)
    return found


def check_sums(found: Assignment, vectors: np.ndarray, weights: np.ndarray, codes: np.ndarray) -> None:
    m, n = len(vectors), len(codes)
    index = np.asarray(found.nearest).reshape(-1)[:m]
    offset = vectors.astype(np.float64) - codes[index]
    sums = np.zeros((n, codes.shape[1] + 1))
    np.add.at(sums, index, np.concatenate([offset * weights[:, None], weights[:, None]], 1))
    np.testing.assert_allclose(found.sums, sums, rtol=1e-4, atol=1e-3)
    error = (offset**2).sum(1) * weights
    np.testing.assert_allclose(found.inertia, error.sum(), rtol=1e-4)
    worst, share = np.asarray(found.worst), np.asarray(found.worst_error)
    real = worst < m
    np.testing.assert_allclose(share[real], error[worst[real]], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(share.max(), error.max(), rtol=1e-4)


@pytest.mark.parametrize(("m", "n", "g"), [(1000, 300, 4), (3333, 700, 8), (500, 20, 1), (129, 128, 32)])
def test_with_all_leaves_listed_it_is_exact(m: int, n: int, g: int) -> None:
    vectors, weights, codes = problem(m, n, g)
    found = listed(make_blocks(vectors, weights), codes, length=10**6)
    expected = squared_distances(vectors, codes)
    nearest = np.asarray(found.nearest).reshape(-1)[:m]
    np.testing.assert_allclose(expected[np.arange(m), nearest], expected.min(1), rtol=1e-4, atol=1e-6)
    assert found.certain.all()
    check_sums(found, vectors, weights, codes)


def test_all_codes_compared_gives_the_same_sums() -> None:
    vectors, weights, codes = problem(2000, 100, 3)
    found = search_all(make_blocks(vectors, weights), jnp.asarray(codes))
    np.testing.assert_array_equal(found.nearest.reshape(-1)[:2000], squared_distances(vectors, codes).argmin(1))
    check_sums(found, vectors, weights, codes)


@pytest.mark.parametrize("g", [2, 4, 9])
def test_what_it_calls_certain_is_nearest_and_trees_add_up(g: int) -> None:
    m = 6000
    vectors, weights, codes = problem(m, 1500, g)
    blocks, exact = make_blocks(vectors, weights), squared_distances(vectors, codes)
    previous, misses, certain_ever = None, [], 0.0
    for turn in range(5):
        found = listed(blocks, codes, length=6, previous=previous, turn=turn)
        previous = np.asarray(found.nearest)
        distance = exact[np.arange(m), previous.reshape(-1)[:m]]
        certain = np.asarray(found.certain).reshape(-1)[:m]
        np.testing.assert_allclose(distance[certain], exact.min(1)[certain], rtol=1e-4, atol=1e-6)
        misses.append(np.mean(distance > exact.min(1) * (1 + 1e-5) + 1e-7))
        certain_ever = max(certain_ever, certain.mean())
    assert misses[0] > 0  # one tree misses some: the next lines mean something
    assert all(later <= earlier for earlier, later in itertools.pairwise(misses))
    assert misses[-1] < 0.2 * misses[0]
    assert certain_ever > (0.2 if g == 2 else 0)


def test_a_known_code_is_kept_unless_a_nearer_one_is_found() -> None:
    vectors, weights, codes = problem(2000, 900, 6)
    exact = squared_distances(vectors, codes)
    blocks = make_blocks(vectors, weights)
    best = np.zeros(blocks.weights.shape, np.int32)
    best.reshape(-1)[:2000] = exact.argmin(1)
    found = listed(blocks, codes, length=1, previous=best)
    distance = exact[np.arange(2000), np.asarray(found.nearest).reshape(-1)[:2000]]
    np.testing.assert_allclose(distance, exact.min(1), rtol=1e-5)


def test_vectors_far_from_zero_keep_their_digits() -> None:
    vectors, weights, codes = problem(3000, 400, 4)
    shift = np.float32(4096.0)
    vectors, codes = vectors + shift, codes + shift
    found = listed(make_blocks(vectors, weights), codes, length=10**6)
    expected = squared_distances(vectors, codes)
    distance = expected[np.arange(3000), np.asarray(found.nearest).reshape(-1)[:3000]]
    assert distance.sum() < expected.min(1).sum() * 1.001


def test_results_do_not_depend_on_how_much_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(1).standard_normal((5000, 4)).astype(np.float32)
    search, probe_lists = (sys.modules[f"cluscomp_jax.kmeans.{name}"] for name in ("search", "probe_lists"))

    def fit() -> tuple[jax.Array, jax.Array]:
        return fit_codebook(vectors, num_codes=300, key=jax.random.key(0), iterations=4)[:2]

    whole = fit()
    monkeypatch.setattr(search, "_PIECES", 1)
    monkeypatch.setattr(probe_lists, "_ROWS", 4)
    search.search_listed.clear_cache()
    probe_lists.make_probe_lists.clear_cache()
    chex.assert_trees_all_equal(fit(), whole)
    search.search_listed.clear_cache()
    probe_lists.make_probe_lists.clear_cache()
