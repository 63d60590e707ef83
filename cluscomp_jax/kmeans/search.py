"""Assigning vectors to codes, all codes compared or only those on the lists of a tree.

Letters: k blocks of m' vectors, n codes, g weights per code; a block is cut into tiles of l vectors.
Every sum runs over one block in a fixed order and then over the blocks, so that no result depends on how much is
computed at once.
"""

from functools import partial

import jax
import jax.numpy as jnp

from cluscomp_jax.kmeans.assign import nearest_of_all
from cluscomp_jax.kmeans.assignment import Assignment, Blocks, add_up, squared_lengths
from cluscomp_jax.kmeans.probe_lists import Lists
from cluscomp_jax.kmeans.tree import EMPTY, CodeTree, leaf_of
from pallas_kernels.code_walk.config import LISTED_TILE as _TILE
from pallas_kernels.code_walk.config import listed_config
from pallas_kernels.implementation import kernels_or_definition

_PIECES = 4
"""Parts in which a block is searched, so that one stays in the cache. Changes the speed only."""


@jax.jit
def search_all(blocks: Blocks, codebook: jax.Array) -> Assignment:
    """Returns the exact assignment; ties go to the lowest index.

    Args:
      blocks: float32 vectors [k, m', g] and weights [k, m'].
      codebook: float32 [n, g], finite.
    """
    k, m, g = blocks.vectors.shape
    index, _ = nearest_of_all(blocks.vectors.reshape(-1, g), codebook)

    def one_block(sums: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        vectors, weights, index = block
        sums, error = add_up(sums, vectors - codebook[index], weights, index)
        return sums, (jnp.sum(error), *_worst(error, jnp.arange(m, dtype=jnp.int32)))

    start = jnp.zeros((codebook.shape[0], g + 1), jnp.float32)
    index = index.reshape(k, m)
    sums, (inertia, worst, error) = jax.lax.scan(one_block, start, (*blocks, index))
    return Assignment(index, jnp.ones((k, m), bool), sums, jnp.sum(inertia), *_flat(worst, error, m))


@partial(jax.jit, donate_argnames="index")
def search_listed(
    blocks: Blocks, index: jax.Array, codebook: jax.Array, tree: CodeTree, probe_lists: Lists
) -> Assignment:
    """Returns the assignment to the nearer of two codes: the one of `index` and the nearest on a list.

    A tile of vectors that are near each other searches the list of the leaf in its middle. Cost: l * b * s
    distances per tile, whatever n is.

    Args:
      blocks: float32 vectors [k, m', g] and weights [k, m'].
      index: int32 [k, m'], the previous code of each vector, -1 for none; donated.
      codebook: float32 [n, g], the codes of which `tree` and `probe_lists` were made.
      tree: of the codes.
      probe_lists: of the leaves of `tree`.
    """
    _, m, g = blocks.vectors.shape
    bits = (m - 1).bit_length()
    far = 4 * jnp.max(jnp.abs(codebook)) + 1.0
    by_leaf = jnp.where((tree.order == EMPTY)[..., None], far, codebook[tree.order])

    def one_block(sums: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        vectors, weights, previous = block
        # Leaf and place in one number: a sort of single numbers is the fast one.
        key = jax.lax.sort((_leaf_of(tree, vectors).astype(jnp.uint32) << bits) | jnp.arange(m, dtype=jnp.uint32))
        at = (key & ((1 << bits) - 1)).astype(jnp.int32)
        leaf = (key[_TILE // 2 :: _TILE] >> bits).astype(jnp.int32)
        vectors, weights, previous = vectors[at], weights[at], previous[at]
        tiles = vectors.reshape(-1, _TILE, g) - probe_lists.centres[leaf][:, None]
        place = kernels_or_definition(_search_tiles, _search_tiles_on_gpu, tiles, leaf, by_leaf, probe_lists)
        listed = jnp.maximum(tree.order.reshape(-1)[place], 0)
        offset, other = vectors - codebook[listed], vectors - codebook[jnp.maximum(previous, 0)]
        nearer = (previous < 0) | (squared_lengths(offset) < squared_lengths(other))
        best, offset = jnp.where(nearer, listed, previous), jnp.where(nearer[:, None], offset, other)
        # |x - c| <= reach - |x - centre| <= |centre - other| - |x - centre| <= |x - other|
        certain = jnp.sqrt(squared_lengths(offset)) + jnp.sqrt(squared_lengths(tiles)).reshape(-1) <= probe_lists.reach[
            leaf
        ].repeat(_TILE)
        sums, error = add_up(sums, offset, weights, best)
        # One scatter puts both into the vectors' order: an uncertain code c is written as ~c, which is below zero.
        back = jnp.zeros((m,), jnp.int32).at[at].set(jnp.where(certain, best, ~best), unique_indices=True)
        return sums, (back, jnp.sum(error), *_worst(error, at))

    start = jnp.zeros((codebook.shape[0], g + 1), jnp.float32)
    sums, (back, inertia, worst, error) = jax.lax.scan(one_block, start, (*blocks, index))
    return Assignment(jnp.maximum(back, ~back), back >= 0, sums, jnp.sum(inertia), *_flat(worst, error, m))


def _search_tiles(tiles: jax.Array, leaf: jax.Array, by_leaf: jax.Array, probe_lists: Lists) -> jax.Array:
    """Returns the place, int32 [m'], in by_leaf [k, b, g] of the nearest listed code of each vector of tiles [t, l, g].

    The tiles' vectors are relative to the centre of their leaf: so are the codes in here, which keeps the digits
    of |x - c|^2 / 2 - |x|^2 / 2 = |c|^2 / 2 - x.c where all of these are far from zero.
    """
    t, tile, g = tiles.shape
    pieces = _PIECES if t % _PIECES == 0 else 1
    codes_per_leaf = by_leaf.shape[1]
    table = by_leaf.reshape(by_leaf.shape[0], -1)

    def one_piece(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        tiles, leaf = piece
        listed, centres = probe_lists.searched[leaf], probe_lists.centres[leaf]

        def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            place, score = best
            where = jax.lax.dynamic_index_in_dim(listed, i, axis=1, keepdims=False)
            codes = table[where].reshape(-1, codes_per_leaf, g) - centres[:, None]
            halves = 0.5 * jnp.sum(jnp.square(codes), axis=2)
            for u in range(codes_per_leaf):
                s = halves[:, u, None]
                for d in range(g):
                    s = s - tiles[:, d] * codes[:, u, d, None]
                closer = s < score
                place = jnp.where(closer, (where * codes_per_leaf + u)[:, None], place)
                score = jnp.where(closer, s, score)
            return place, score

        start = jnp.zeros((len(leaf), tile), jnp.int32), jnp.full((len(leaf), tile), jnp.inf, jnp.float32)
        place: jax.Array = jax.lax.fori_loop(0, listed.shape[1], step, start)[0]
        return place

    # Vectors in the lanes, and the g lanes of one tile side by side: g streams a power of two apart would share a
    # few cache lines.
    lanes = tiles.swapaxes(1, 2).reshape(pieces, t // pieces, g, tile)
    place: jax.Array = jax.lax.map(one_piece, (lanes, leaf.reshape(pieces, -1)))
    return place.reshape(-1)


def _search_tiles_on_gpu(
    tiles: jax.Array, leaf: jax.Array, by_leaf: jax.Array, probe_lists: Lists, *, interpret: bool
) -> jax.Array:
    """Returns what `_search_tiles` does, by one GPU kernel."""
    from pallas_kernels.code_walk.many import nearest_listed

    g = tiles.shape[2]
    vectors = (tiles + probe_lists.centres[leaf][:, None]).reshape(-1, g)
    codes = by_leaf.swapaxes(1, 2)
    return nearest_listed(vectors, leaf, codes, probe_lists.searched, tile=listed_config(g), interpret=interpret)


def _leaf_of(tree: CodeTree, vectors: jax.Array) -> jax.Array:
    """Returns the leaf int32 [m] of every vector float32 [m, g], by one GPU kernel in a program for a GPU."""
    if tree.cuts.shape[0] == 0:
        return leaf_of(tree, vectors)

    def kernel(tree: CodeTree, vectors: jax.Array, *, interpret: bool) -> jax.Array:
        from pallas_kernels.code_walk import many

        return many.leaf_of(vectors, tree.directions, tree.cuts, interpret=interpret)

    return kernels_or_definition(leaf_of, kernel, tree, vectors)


def _worst(error: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (place int32 [m'/l], error [m'/l]) of the worst vector of every tile."""
    tiles = error.reshape(-1, _TILE)
    worst = jnp.argmax(tiles, axis=1)
    return at.reshape(-1, _TILE)[jnp.arange(len(worst)), worst], jnp.max(tiles, axis=1)


def _flat(worst: jax.Array, error: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns places in the flattened blocks and errors, both [w]."""
    return (worst + block * jnp.arange(len(worst), dtype=jnp.int32)[:, None]).reshape(-1), error.reshape(-1)
