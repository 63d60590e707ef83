"""A tree over the codes: which few codes each leaf has, and the leaf of a vector.

The codes are rotated at random and halved repeatedly at the median, along one direction of the rotated frame after the
other, until a leaf has 9 to 16 of them. Another rotation gives another tree with other cell boundaries, so that a code
that one tree misses is found by the next.
Letters: n codes, g weights per code, m vectors; 2^depth leaves of b codes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LARGEST_LEAF = 16
EMPTY = -1
"""The entry of `CodeTree.order` for a place without a code."""


class CodeTree(NamedTuple):
    """A balanced tree of n codes. The children of node i are 2i+1 (at or below the cut) and 2i+2.

    Attributes:
      directions: float32 [g, d] of the rotated frame; a node of level l is cut along direction l mod d.
      cuts: float32 [2^depth - 1], in heap order.
      order: int32 [2^depth, b], each of the n codes once, and EMPTY in the places that are left, all of them in the
        last leaves.
    """

    directions: jax.Array
    cuts: jax.Array
    order: jax.Array


def leaves_of(num_codes: int) -> tuple[int, int]:
    """Returns (depth, b) of a tree of `num_codes` codes, >= 1: 2^depth leaves of b <= 16 codes."""
    depth = (-(-num_codes // _LARGEST_LEAF) - 1).bit_length()
    return depth, -(-num_codes // (1 << depth))


@partial(jax.jit, static_argnames="g")
def random_rotation(key: jax.Array, turn: jax.Array | int, *, g: int) -> jax.Array:
    """Returns an orthogonal matrix float32 [g, g]; a program of its own, because it compiles as long as a whole tree.

    Args:
      key: seed of all rotations.
      turn: number of this one, integer, >= 0.
      g: weights per code.
    """
    rotation: jax.Array = jax.random.orthogonal(jax.random.fold_in(key, turn), g, dtype=jnp.float32)
    return rotation


@jax.jit
def grow_tree(codebook: jax.Array, rotation: jax.Array) -> CodeTree:
    """Returns the tree of the codes.

    Args:
      codebook: float32 [n, g], finite, 1 <= n <= 65536.
      rotation: float32 [g, g], orthogonal, its columns the directions that are cut.
    """
    n, g = codebook.shape
    depth, leaf = leaves_of(n)
    places = leaf << depth
    directions = rotation[:, : max(1, min(g, depth))]
    along = jnp.dot(codebook, directions, precision="highest").T
    along = jnp.pad(along, ((0, 0), (0, places - n)), constant_values=jnp.inf)
    by_rank = _nearly_sorted(along)
    rank = _inverse(by_rank)
    order = jnp.arange(places, dtype=jnp.uint32)
    node = jnp.zeros((places,), jnp.uint32)
    cuts = [jnp.zeros((0,), jnp.float32)]
    for level in range(depth):
        t = level % directions.shape[1]
        # Sorted by node and then by rank in one number: a sort of single numbers is the fast one.
        order = by_rank[t][jax.lax.sort((node << 16) | rank[t]) & 0xFFFF]
        half = places >> (level + 1)
        sorted_along = along[t][order].reshape(1 << level, 2 * half)
        cuts.append((sorted_along[:, half - 1] + sorted_along[:, half]) / 2)
        children = jnp.repeat(jnp.arange(2 << level, dtype=jnp.uint32), half)
        node = node.at[order].set(children, unique_indices=True)
    by_leaf = order.astype(jnp.int32).reshape(1 << depth, leaf)
    return CodeTree(directions, jnp.concatenate(cuts), jnp.where(by_leaf < n, by_leaf, EMPTY))


def _nearly_sorted(values: jax.Array) -> jax.Array:
    """Returns the order, uint32 [d, n], of each row of values [d, n], n <= 65536, taken to 8 significant bits.

    A sort of single numbers whose lower half is their place is many times as fast as a sort of pairs, and
    codes within 1% of each other may be on either side of a cut.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    rising = jnp.where(bits < 0, ~bits, bits ^ -(2**31))  # read as unsigned, in the order of the values
    place = jnp.arange(values.shape[1], dtype=jnp.uint32)
    return jax.lax.sort((rising.astype(jnp.uint32) >> 16 << 16) | place, dimension=1) & 0xFFFF


def _inverse(permutations: jax.Array) -> jax.Array:
    """Returns the inverses of permutations [d, n]."""
    rows = jnp.arange(permutations.shape[0])[:, None]
    steps = jnp.broadcast_to(jnp.arange(permutations.shape[1], dtype=permutations.dtype), permutations.shape)
    return jnp.zeros_like(permutations).at[rows, permutations].set(steps, unique_indices=True)


def leaf_of(tree: CodeTree, vectors: jax.Array) -> jax.Array:
    """Returns int32 [m], the leaf of each of the vectors float32 [m, g]."""
    depth = tree.cuts.shape[0].bit_length()
    if depth == 0:
        return jnp.zeros(vectors.shape[:1], jnp.int32)
    along = jnp.dot(tree.directions.T, vectors.T, precision="highest")

    def descend(level: jax.Array, node: jax.Array) -> jax.Array:
        coordinate = jax.lax.dynamic_index_in_dim(along, level % along.shape[0], keepdims=False)
        return 2 * node + 1 + jnp.asarray(coordinate > tree.cuts[node], jnp.int32)

    # A loop and not its unrolling: fused into one expression the levels would be computed over and over.
    node: jax.Array = jax.lax.fori_loop(0, depth, descend, jnp.zeros(vectors.shape[:1], jnp.int32))
    return node - ((1 << depth) - 1)
