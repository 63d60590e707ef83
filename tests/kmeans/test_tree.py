"""The tree of the codes and the lists of its leaves, against walks and distances in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.kmeans.probe_lists import make_probe_lists
from cluscomp_jax.kmeans.tree import EMPTY, CodeTree, grow_tree, leaf_of, leaves_of, random_rotation


def random_codes(n: int, g: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (n, g)).astype(np.float32)


def plant(codes: np.ndarray | jax.Array, seed: int, turn: int) -> CodeTree:
    tree: CodeTree = grow_tree(jnp.asarray(codes), random_rotation(jax.random.key(seed), turn, g=codes.shape[1]))
    return tree


def walk(tree: CodeTree, vector: np.ndarray) -> int:
    """The leaf of one vector, cut by cut."""
    directions, cuts = np.asarray(tree.directions), np.asarray(tree.cuts)
    node, level = 0, 0
    while node < len(cuts):
        along = float(vector @ directions[:, level % directions.shape[1]])
        node, level = 2 * node + (2 if along > cuts[node] else 1), level + 1
    return node - len(cuts)


@pytest.mark.parametrize("n", [1, 16, 17, 257, 1000, 32000, 50000, 65500, 65536])
def test_leaves_hold_nine_to_sixteen_codes(n: int) -> None:
    depth, leaf = leaves_of(n)
    assert n <= leaf << depth <= 65536
    assert leaf <= 16
    assert leaf >= 9 or n < 9


@pytest.mark.parametrize(("n", "g"), [(1, 1), (5, 3), (100, 2), (777, 4), (1024, 16), (3000, 9)])
def test_every_code_stands_in_one_leaf_and_most_would_fall_into_it(n: int, g: int) -> None:
    codes = random_codes(n, g)
    tree = plant(codes, 0, 0)
    order = np.asarray(tree.order)
    np.testing.assert_array_equal(np.sort(order[order != EMPTY]), np.arange(n))
    places = order.reshape(-1)
    assert (places[n:] == EMPTY).all()  # all empty places are in the last leaves
    standing = np.empty(n, int)
    leaf, _ = np.nonzero(order != EMPTY)
    standing[order[order != EMPTY]] = leaf
    # The sort takes coordinates to 1%: codes that near to a cut may stand on its other side.
    assert np.mean(np.asarray(leaf_of(tree, jnp.asarray(codes))) == standing) > 0.9


def test_vectors_fall_as_a_walk_from_cut_to_cut_would_lead_them() -> None:
    tree = plant(random_codes(700, 5), 1, 3)
    vectors = random_codes(300, 5, seed=1)
    expected = [walk(tree, vector) for vector in vectors]
    assert np.mean(np.asarray(leaf_of(tree, jnp.asarray(vectors))) == expected) > 0.99  # a rounding apart from a cut


def test_every_turn_grows_another_tree() -> None:
    codes = jnp.asarray(random_codes(100, 4))
    first, again, other = (plant(codes, 0, turn) for turn in (0, 0, 1))
    np.testing.assert_array_equal(first.order, again.order)
    assert not np.array_equal(first.cuts, other.cuts)


def test_equal_codes_make_a_tree() -> None:
    tree = plant(jnp.ones((100, 3)), 0, 0)
    assert np.isfinite(tree.cuts).all()
    assert sorted(np.asarray(tree.order).reshape(-1))[-100:] == list(range(100))


@pytest.mark.parametrize(("n", "g", "length"), [(600, 4, 4), (900, 8, 3), (500, 2, 7)])
def test_no_code_off_the_list_is_nearer_to_the_centre_than_the_reach(n: int, g: int, length: int) -> None:
    codes = random_codes(n, g)
    tree = plant(codes, 2, 0)
    probe_lists = make_probe_lists(tree, jnp.asarray(codes), length=length)
    order, searched = np.asarray(tree.order), np.asarray(probe_lists.searched)
    assert searched.shape == (len(order), length)
    for leaf in np.flatnonzero((order != EMPTY).any(1)):
        members = order[leaf][order[leaf] != EMPTY]
        centre = codes[members].astype(np.float64).mean(0)
        np.testing.assert_allclose(probe_lists.centres[leaf], centre, rtol=1e-4, atol=1e-5)
        assert searched[leaf][0] == leaf
        assert len(set(searched[leaf])) == length
        off = np.setdiff1d(np.arange(n), order[searched[leaf]])
        nearest = np.sqrt(((codes[off] - centre) ** 2).sum(1).min())
        assert 0 <= float(probe_lists.reach[leaf]) <= nearest * (1 + 1e-5)


def test_lists_of_all_leaves_reach_everywhere() -> None:
    codes = jnp.asarray(random_codes(100, 3))
    tree = plant(codes, 0, 0)
    probe_lists = make_probe_lists(tree, codes, length=1000)
    assert probe_lists.searched.shape == (8, 8)
    assert np.isinf(probe_lists.reach).all()
