"""A search index of the codes (`CodeIndex`): several trees that each vector searches by itself.

It finds the nearest code where vectors come a few at a time. `search_listed` sorts many vectors so that neighbours
search together. Error feedback has the vectors of one input channel at a time, which are too few for that, and as many
codes. Each tree misses some nearest codes, and no two trees miss the same ones.
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
"""Up to this many codes, times g, a comparison with all of them is as fast."""


class CodeIndex(NamedTuple):
    """Search trees over n codes, stacked on a leading axis.

    Attributes:
      trees: the trees, each leaf of theirs with a leading axis t.
      codes: float32 [t, k, b, g], the codes by leaf; inf in places without a code.
      searched: int32 [t, k, s], the leaves that a vector of each leaf searches.
    """

    trees: CodeTree
    codes: jax.Array
    searched: jax.Array


def build_code_index(codebook: jax.Array, key: jax.Array) -> CodeIndex | None:
    """Returns the search trees of the codes, or None where the codes are few enough to compare a vector with all.

    Args:
      codebook: [n, g], floating, finite, n <= 65536. Other values need other trees.
      key: seed of the rotations; same key, same trees.
    """
    n, g = codebook.shape
    if n <= _COMPARE_ALL * g:
        return None
    code_index: CodeIndex = grow_code_index(codebook.astype(jnp.float32), key)
    return code_index


@jax.jit
def grow_code_index(codebook: jax.Array, key: jax.Array) -> CodeIndex:
    """Returns the search trees of the codes, in one program for all.

    Args:
      codebook: float32 [n, g], finite, 1 <= n <= 65536.
      key: seed of the rotations.
    """
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
    """Returns the index int32 [m] of the nearest code that the trees find, or of the nearest of all without trees.

    Args:
      vectors: [m, g], floating, finite; computed in float32.
      codebook: float32 [n, g], the codes of which `code_index` was built.
      code_index: of `build_code_index`. None: every vector is compared with all codes.
      previous: int32 [m], a code for each vector that is kept unless a nearer one is found. None: there is none.
    """
    if code_index is None:
        everywhere: jax.Array = assign(vectors, codebook)[0]
        return everywhere
    vectors = vectors.astype(jnp.float32)
    start = jnp.zeros(len(vectors), jnp.int32) if previous is None else previous.astype(jnp.int32)
    search = jax.vmap(_search_tree, in_axes=(0, None, None, None))  # all trees at once: on a GPU each step is a launch
    codes, distances = search(code_index, vectors, start, squared_lengths(codebook[start] - vectors))
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
