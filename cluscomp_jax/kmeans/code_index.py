"""The nearest code of vectors that come a few at a time: a handful of trees searched for each vector by itself.

`search_listed` sorts many vectors and lets neighbours search together; error feedback has the vectors of one input
channel at a time, too few for that, and as many codes. Each tree misses some nearest codes, and no two miss the same.
Letters: m vectors, n codes, g weights per code; t trees of k leaves of b codes; s leaves on a list.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.kmeans.assign import assign
from cluscomp_jax.kmeans.assignment import squared_lengths
from cluscomp_jax.kmeans.probe_lists import make_probe_lists
from cluscomp_jax.kmeans.tree import EMPTY, CodeTree, grow_tree, leaf_of, leaves_of, random_rotation

_TREES = 3
_COMPARED = 64
"""Codes that one tree compares with a vector, times g: together the trees add half a percent to the error at most."""
_COMPARE_ALL = 1024
"""Up to so many codes, times g, comparing with all of them is as fast."""


class CodeIndex(NamedTuple):
    """Trees stacked on a leading axis: each one's parts, its codes [t, k, b, g] and lists of leaves [t, k, s]."""

    trees: CodeTree
    codes: jax.Array
    searched: jax.Array


def build_code_index(codebook: jax.Array, key: jax.Array) -> CodeIndex | None:
    """Returns the trees of the codes [n, g], or None where there are so few that all are compared.

    Args:
      codebook: finite, n <= 65536; the forest is of the codes as they lie now.
      key: decides the rotations; same key, same trees.
    """
    n, g = codebook.shape
    if n <= _COMPARE_ALL * g:
        return None
    code_index: CodeIndex = grow_forest(codebook.astype(jnp.float32), key)
    return code_index


@jax.jit
def grow_forest(codebook: jax.Array, key: jax.Array) -> CodeIndex:
    """Returns the trees of the codes float32 [n, g], one program for all."""
    n, g = codebook.shape
    _, leaf = leaves_of(n)

    def grow(turn: jax.Array) -> CodeIndex:
        tree = grow_tree(codebook, random_rotation(key, turn, g=g))
        probe_lists = make_probe_lists(tree, codebook, length=-(-_COMPARED * g // leaf))
        return CodeIndex(
            tree, jnp.where((tree.order == EMPTY)[..., None], jnp.inf, codebook[tree.order]), probe_lists.searched
        )

    code_index: CodeIndex = jax.lax.map(grow, jnp.arange(_TREES, dtype=jnp.int32))
    return code_index


def nearest_code(
    vectors: jax.Array, codebook: jax.Array, code_index: CodeIndex | None, previous: jax.Array | None = None
) -> jax.Array:
    """Returns the index int32 [m] of the nearest code found, the nearest of all where there is no forest.

    Args:
      vectors: [m, g], finite.
      codebook: float32 [n, g], those of which the forest was planted.
      forest: of `build_code_index`.
      known: int32 [m], a code for each vector that is kept unless a nearer one is found.
    """
    if code_index is None:
        everywhere: jax.Array = assign(vectors, codebook)[0]
        return everywhere
    vectors = vectors.astype(jnp.float32)
    start = jnp.zeros(len(vectors), jnp.int32) if previous is None else previous.astype(jnp.int32)
    assignment = jax.vmap(_search_tree, in_axes=(0, None, None, None))  # side by side: on a GPU each step is a launch
    codes, distances = assignment(code_index, vectors, start, squared_lengths(codebook[start] - vectors))
    nearest: jax.Array = jnp.take_along_axis(codes, jnp.argmin(distances, axis=0)[None], axis=0)[0]
    return nearest


def _search_tree(
    grown: CodeIndex, vectors: jax.Array, start: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (code int32 [m], squared distance [m]) found by one tree, `start` at `first` where none is nearer."""
    listed = grown.searched[leaf_of(grown.trees, vectors)]
    size = grown.codes.shape[1]

    def compare(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        leaf = jax.lax.dynamic_index_in_dim(listed, i, axis=1, keepdims=False)
        distance = squared_lengths(grown.codes[leaf] - vectors[:, None])
        least = jnp.min(distance, axis=1)
        nearer = least < best[1]
        place = leaf * size + jnp.argmin(distance, axis=1)
        return jnp.where(nearer, place, best[0]), jnp.where(nearer, least, best[1])

    nowhere = jnp.full(len(vectors), -1, jnp.int32)
    place, least = jax.lax.fori_loop(0, listed.shape[1], compare, (nowhere, first))
    return jnp.where(place >= 0, grown.trees.order.reshape(-1)[place], start), least
