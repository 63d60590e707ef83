"""The GPU kernels that search nearest codes for many vectors at once, as k-means does.

Letters: m vectors, n codes, g weights per vector; a program takes v vectors and compares them with k codes at a time;
leaves of b codes, s of them on the list of a leaf; a tile is l vectors that search one list. Checks no shapes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Ref, launcher, pl, plgpu, span
from pallas_kernels.code_walk.config import WalkConfig
from pallas_kernels.code_walk.nearest import (
    SearchTrees,
    among_all,
    columns_of,
    least_of,
    leaves_of_vectors,
    squared_distances,
)


def _nearest_kernel(
    vectors_ref: Ref, columns_ref: Ref, code_ref: Ref, distance_ref: Ref, *, n: int, g: int, tile: WalkConfig
) -> None:
    """Finds the nearest of all codes for some vectors."""
    vector = span(pl.program_id(0) * tile.vectors, tile.vectors)
    exists = vector < vectors_ref.shape[0]
    x = tuple(plgpu.load(vectors_ref.at[vector, t], mask=exists, other=0) for t in range(g))
    code, distance = among_all(x, columns_ref, n, tile.codes)
    plgpu.store(code_ref.at[vector], code, mask=exists)
    plgpu.store(distance_ref.at[vector], distance, mask=exists)


def nearest(
    vectors: jax.Array, codebook: jax.Array, *, tile: WalkConfig, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns (index int32 [m], squared distance float32 [m]) of the nearest code; of equal ones the first.

    Args:
      vectors: float32 [m, g], finite.
      codebook: float32 [n, g], finite.
      tile: how the vectors are cut into programs.
    """
    (m, g), n = vectors.shape, len(codebook)
    launch = launcher(
        partial(_nearest_kernel, n=n, g=g, tile=tile),
        "code_nearest",
        grid=(pl.cdiv(m, tile.vectors),),
        out=[((m,), jnp.int32), ((m,), jnp.float32)],
        operations=m * n * (2 * g + 3),
        moved=4 * m * (g + 2),
        num_warps=tile.num_warps,
        num_stages=2,
        interpret=interpret,
    )
    index, distance = launch(vectors, columns_of(codebook, tile.codes))
    return index, distance


def _listed_kernel(
    vectors_ref: Ref, leaf_ref: Ref, codes_ref: Ref, searched_ref: Ref, place_ref: Ref, *, tile: Any
) -> None:
    """Finds the place of the nearest code on the list of one leaf for the vectors of a tile."""
    q, (_, g, b), lists, k = pl.program_id(0), codes_ref.shape, searched_ref.shape[1], tile.codes
    vector, leaf, candidate = span(q * tile.vectors, tile.vectors), leaf_ref[q], span(0, k)
    x = tuple(vectors_ref[vector, jnp.full_like(vector, t)][:, None] for t in range(g))
    wide = (tile.vectors, k)

    def compare(chunk: Any, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at = chunk * k + candidate
        exists = at < lists * b
        where = plgpu.load(searched_ref.at[leaf, at // b], mask=exists, other=0)
        codes = (plgpu.load(codes_ref.at[where, t, at % b], mask=exists, other=jnp.inf)[None, :] for t in range(g))
        distance, place = squared_distances(x, tuple(codes)), (where * b + at % b)[None, :]
        nearer = distance < best[0]
        return jnp.where(nearer, distance, best[0]), jnp.where(nearer, jnp.broadcast_to(place, wide), best[1])

    start = jnp.full(wide, jnp.inf, jnp.float32), jnp.zeros(wide, jnp.int32)
    distance, place = jax.lax.fori_loop(0, pl.cdiv(lists * b, k), compare, start)
    place_ref[vector] = least_of(distance, place, 2**31 - 1)[1]


def nearest_listed(
    vectors: jax.Array,
    leaf: jax.Array,
    codes: jax.Array,
    searched: jax.Array,
    *,
    tile: WalkConfig,
    interpret: bool = False,
) -> jax.Array:
    """Returns the place int32 [m], leaf * b + number, of the nearest code on the list of each vector's tile.

    Args:
      vectors: float32 [m, g], m a multiple of l = `tile.vectors`.
      leaf: int32 [m / l], the leaf whose list a tile searches.
      codes: float32 [leaves, g, b], the codes by leaf; far away or inf in places without a code.
      searched: int32 [leaves, s].
      tile: l and k.
    """
    launch = launcher(
        partial(_listed_kernel, tile=tile),
        "code_nearest_listed",
        grid=(len(leaf),),
        out=((len(vectors),), jnp.int32),
        operations=len(vectors) * searched.shape[1] * codes.shape[2] * (2 * codes.shape[1] + 3),
        moved=4 * len(vectors) * (codes.shape[1] + 1),
        num_warps=tile.num_warps,
        num_stages=2,
        interpret=interpret,
    )
    place: jax.Array = launch(vectors, leaf, codes, searched)
    return place


def _leaf_kernel(vectors_ref: Ref, directions_ref: Ref, cuts_ref: Ref, leaf_ref: Ref, *, v: int) -> None:
    """Descends a tree for some vectors."""
    m, g = vectors_ref.shape
    vector = span(pl.program_id(0) * v, v)
    x = tuple(plgpu.load(vectors_ref.at[vector, t], mask=vector < m, other=0) for t in range(g))
    (leaf,) = leaves_of_vectors(x, SearchTrees(directions_ref, cuts_ref, None, None, None))
    plgpu.store(leaf_ref.at[vector], leaf, mask=vector < m)


def leaf_of(vectors: jax.Array, directions: jax.Array, cuts: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Returns the leaf int32 [m] of every vector float32 [m, g] in a tree.

    Args:
      vectors: float32 [m, g].
      directions: float32 [g, d]; a node of level l is cut along direction l mod d.
      cuts: float32 [2^depth - 1], in heap order, depth >= 1.
    """
    v = 256
    launch = launcher(
        partial(_leaf_kernel, v=v),
        "code_leaf",
        grid=(pl.cdiv(len(vectors), v),),
        out=((len(vectors),), jnp.int32),
        operations=len(vectors) * (2 * directions.size + 3 * len(cuts).bit_length()),
        moved=4 * len(vectors) * (len(directions) + 1),
        num_warps=8,
        num_stages=2,
        interpret=interpret,
    )
    leaf: jax.Array = launch(vectors, directions[None], cuts[None])
    return leaf
