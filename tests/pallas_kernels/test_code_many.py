"""Searches of many vectors, interpreted, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.code_walk.config import LISTED_TILE, WalkConfig, listed_config, nearest_config
from pallas_kernels.code_walk.many import leaf_of, nearest, nearest_listed


def quarters(rng, *shape):
    """Numbers of a few bits: float32 holds their squares and sums exactly."""
    return rng.integers(-12, 13, shape) / 4


@pytest.mark.parametrize(("m", "g", "n"), [(70, 4, 40), (5, 3, 16), (33, 1, 2)])
def test_the_nearest_of_all_codes_is_found_and_the_first_of_equal_ones(m, g, n):
    rng = np.random.default_rng(m)
    vectors, codes = quarters(rng, m, g), quarters(rng, n, g)
    tile = WalkConfig(vectors=16, codes=16)
    found = nearest(*(jnp.asarray(a, jnp.float32) for a in (vectors, codes)), tile=tile, interpret=True)
    distances = np.sum((vectors[:, None] - codes) ** 2, axis=2)
    np.testing.assert_array_equal(found[0], distances.argmin(axis=1))
    np.testing.assert_array_equal(found[1], distances.min(axis=1))


def test_a_tile_searches_the_list_of_its_leaf():
    rng = np.random.default_rng(0)
    g, leaves, b, lists, tiles = 3, 8, 5, 3, 4
    codes = quarters(rng, leaves, b, g)
    codes[-1, -1] = np.inf  # a place without a code
    searched = np.stack([rng.permutation(leaves)[:lists] for _ in range(leaves)])
    leaf, vectors = rng.integers(0, leaves, tiles), quarters(rng, tiles * LISTED_TILE, g)
    tile = WalkConfig(vectors=LISTED_TILE, codes=4)
    arrays = (jnp.asarray(a, jnp.float32) for a in (vectors, codes.swapaxes(1, 2)))
    numbers = (jnp.asarray(a, jnp.int32) for a in (leaf, searched))
    x, by_leaf = arrays
    place = np.asarray(nearest_listed(x, next(numbers), by_leaf, next(numbers), tile=tile, interpret=True))
    for i, vector in enumerate(vectors):
        listed = searched[leaf[i // LISTED_TILE]]
        distances = np.sum((codes - vector) ** 2, axis=2)
        assert place[i] // b in listed
        assert distances.reshape(-1)[place[i]] == distances[listed].min()


def test_a_leaf_is_where_the_cuts_of_its_nodes_lead():
    rng = np.random.default_rng(1)
    directions, cuts, vectors = quarters(rng, 3, 2), quarters(rng, 15), quarters(rng, 300, 3)
    leaf = leaf_of(*(jnp.asarray(a, jnp.float32) for a in (vectors, directions, cuts)), interpret=True)
    for vector, found in zip(vectors, np.asarray(leaf), strict=True):
        node = 0
        for level in range(4):
            node = 2 * node + (2 if vector @ directions[:, level % 2] > cuts[node] else 1)
        assert found == node - 15


def test_tiles_are_powers_of_two():
    for g in range(1, 33):
        for tile in (listed_config(g), nearest_config(g)):
            assert tile.vectors & (tile.vectors - 1) == tile.codes & (tile.codes - 1) == 0
