"""Walks of nearest codes, interpreted, against a walk written out in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.code_walk.config import WalkConfig, walk_config
from pallas_kernels.code_walk.nearest import SearchTrees, walk_nearest

TILE = WalkConfig(vectors=4, codes=16)


def squared_distances(targets, codes, outputs):
    """Returns float64 [c, n] of a channel's targets [c * g] from codes [n, g], of the first `outputs` weights."""
    g = codes.shape[1]
    counts = (np.arange(len(targets)) < outputs).reshape(-1, 1, g)
    return np.sum((targets.reshape(-1, 1, g) - codes) ** 2 * counts, axis=2)


def walk(base, value, weights, codes, outputs):
    """Returns (codes, deltas) of a walk, all numbers float64."""
    rows, width = base.shape
    chosen, delta = np.zeros((rows, width // codes.shape[1]), int), np.zeros((rows, width))
    for i in reversed(range(rows)):
        target = base[i] + weights[i, i + 1 :] @ delta[i + 1 :]
        chosen[i] = squared_distances(target, codes, outputs).argmin(axis=1)
        delta[i] = value[i] - codes[chosen[i]].reshape(-1)
    return chosen, delta


def few_bits(seed, rows, outputs, g, n):
    """A walk of numbers of a few bits each, whose every sum and product float32 holds exactly."""
    rng = np.random.default_rng(seed)
    width = -(-outputs // g) * g
    base, change = rng.integers(-8, 9, (rows, width)) / 4, rng.integers(-2, 3, (rows, width)) / 4
    weights = rng.integers(-1, 2, (rows, rows)) / 2  # what is not above the diagonal must not count
    return base, base + change, weights, rng.integers(-12, 13, (n, g)) / 4


def interpreted(problem, outputs, trees=None, previous=None, tile=TILE):
    arrays = [jnp.asarray(array, jnp.float32) for array in problem]
    found = walk_nearest(*arrays, trees, previous, outputs=outputs, tile=tile, interpret=True)
    return [np.asarray(array, np.float64) for array in found]


@pytest.mark.parametrize(("rows", "outputs", "g", "n"), [(20, 37, 4, 50), (7, 9, 3, 17), (3, 8, 1, 2), (1, 5, 8, 40)])
def test_a_walk_is_that_of_the_oracle(rows, outputs, g, n):
    problem = few_bits(rows, rows, outputs, g, n)
    expected, deltas = walk(*problem, outputs)
    codes, delta = interpreted(problem, outputs)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(delta, deltas)


def check_nearest(problem, outputs, codes, delta, tolerance):
    """Whatever was rounded before a channel, its target follows from the deltas that the walk returns."""
    base, _, weights, table = (np.asarray(array, np.float64) for array in problem)
    for i in range(len(base)):
        target = base[i] + weights[i, i + 1 :] @ delta[i + 1 :]
        distances = squared_distances(target, table, outputs)
        chosen = distances[np.arange(len(distances)), codes[i].astype(int)]
        assert np.all(chosen <= distances.min(axis=1) * (1 + tolerance) + tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_every_code_is_nearest_to_its_own_target(seed):
    rng = np.random.default_rng(seed)
    base, value = rng.standard_normal((2, 24, 30)).astype(np.float32)
    weights = 0.3 * rng.standard_normal((24, 24)).astype(np.float32)
    table = rng.standard_normal((40, 3)).astype(np.float32)
    codes, delta = interpreted((base, value, weights, table), 29)
    np.testing.assert_allclose(delta, value - table[codes.astype(int)].reshape(24, 30), atol=1e-6)
    check_nearest((base, value, weights, table), 29, codes, delta, 1e-6)


def split_once(codes, lists):
    """One tree of two leaves, cut at 0 along the first weight, either leaf with half of the codes."""
    n, g = codes.shape
    order = np.argsort(codes[:, 0], kind="stable").reshape(2, n // 2)
    return SearchTrees(
        directions=jnp.eye(g, 1)[None],
        cuts=jnp.zeros((1, 1)),
        order=jnp.asarray(order.reshape(1, n), jnp.int32),
        codes=jnp.asarray(codes[order].swapaxes(1, 2), jnp.float32)[None],
        searched=jnp.asarray(lists, jnp.int32)[None],
    )


def test_lists_of_all_leaves_find_the_nearest_of_all():
    problem = few_bits(5, 9, 22, 2, 48)
    codes, delta = interpreted(problem, 22, split_once(problem[3], [[0, 1], [1, 0]]))
    check_nearest(problem, 22, codes, delta, 0.0)


def test_a_vector_searches_the_list_of_its_leaf_and_keeps_a_nearer_code():
    base, value, weights, table = few_bits(6, 1, 40, 2, 40)
    order = np.argsort(table[:, 0], kind="stable").reshape(2, 20)
    previous = np.random.default_rng(0).integers(0, 40, (1, 20))
    problem, trees = (base, value, weights, table), split_once(table, [[0], [1]])
    codes, _ = interpreted(problem, 40, trees, jnp.asarray(previous, jnp.int32))
    distances = squared_distances(base[0], table, 40)
    for vector, code in enumerate(codes[0].astype(int)):
        leaf = order[int(base[0, 2 * vector] > 0)]
        allowed = [*leaf, previous[0, vector]]
        assert code in allowed
        assert distances[vector, code] == distances[vector, allowed].min()


def test_a_last_vector_past_the_outputs_is_compared_with_all_codes():
    problem = few_bits(7, 6, 21, 2, 40)
    codes, _ = interpreted(problem, 21, split_once(problem[3], [[0], [0]]))
    target = problem[0][-1]  # of the first channel of the walk, which no other changes
    assert (
        squared_distances(target, problem[3], 21)[-1, int(codes[-1, -1])]
        == np.min(np.abs(problem[3][:, 0] - target[20])) ** 2
    )


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("g", [1, 3, 4, 9, 32])
def test_tiles_are_powers_of_two_and_take_no_more_codes_than_there_are(g, listed):
    for c in (1, 100, 2048, 7168):
        tile = walk_config(c, g, 300, listed=listed)
        assert tile.vectors & (tile.vectors - 1) == tile.codes & (tile.codes - 1) == 0
        assert tile.codes <= 512
