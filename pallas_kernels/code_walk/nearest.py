"""The GPU kernel that searches nearest codes for one channel after another: a walk.

A walk is error feedback, or a pass of refinement, over the channels of a block, from the last row to the first:

    target_i = base_i + sum_{j>i} weights_ij delta_j,
    code_i = the code nearest to target_i,    delta_i = value_i - codebook[code_i].

Vectors of one channel do not depend on each other. So one program takes some vectors of every channel and walks all
channels by itself; their deltas are in its registers.

Letters: r channels of a block (rows), o outputs, g weights per code, c = ceil(o/g) vectors of a channel, n codes; a
program takes v vectors, in v lanes, and compares them with k codes at a time; s leaves of b codes on a list. Arrays of
vectors are a tuple of g arrays, one for each weight, so that g need not be a power of two. Checks no shapes.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Ref, launcher, pl, plgpu, span
from pallas_kernels.code_walk.config import WalkConfig, next_power

Vectors = tuple[jax.Array, ...]
"""g arrays of one shape, the first weights of all vectors, the second ones, and so on."""


class SearchTrees(NamedTuple):
    """Search trees over the codes, each leaf with a leading axis t, as the kernels read them.

    Attributes:
      directions: float32 [t, g, d] of the rotated frame; a node of level l is cut along direction l mod d.
      cuts: float32 [t, 2^depth - 1], in heap order.
      order: int32 [t, leaves * b], the code of every place.
      codes: float32 [t, leaves, g, b], the codes by leaf; inf in places without a code.
      searched: int32 [t, leaves, s], the leaves that a vector of each leaf searches.
    """

    directions: Any
    cuts: Any
    order: Any
    codes: Any
    searched: Any


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What is static of a walk: its letters, and `partial`, the weights of a last vector that extends past o, or 0."""

    r: int
    c: int
    g: int
    n: int
    partial: int


def squared_distances(x: Vectors, codes: Vectors, counts: Vectors | None = None) -> jax.Array:
    """Returns the squared distances of vectors from codes that broadcast; `counts`: 0 or 1, the weights that count."""
    total: Any = None
    for t, (one, other) in enumerate(zip(x, codes, strict=True)):
        square = jnp.square(one - other)
        square = square if counts is None else square * counts[t]
        total = square if total is None else total + square
    found: jax.Array = total
    return found


def least_of(distance: jax.Array, code: jax.Array, above: int) -> tuple[jax.Array, jax.Array]:
    """Returns (least distance [v], the lowest code at it [v]) over the second axis; codes are below `above`."""
    least = jnp.min(distance, axis=1)
    return least, jnp.min(jnp.where(distance == least[:, None], code, above), axis=1)


def among_all(
    x: Vectors, columns_ref: Ref, n: int, k: int, counts: Vectors | None = None, chunks: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (code int32 [v], squared distance [v]) of the nearest of all codes; of equal ones the first.

    Args:
      x: the vectors, [v] each.
      columns_ref: float32 [g, n'], the codes padded to a multiple of k by inf.
      counts: as `squared_distances` takes it, [v, 1] each.
      chunks: of k codes that are compared; None: all.
    """
    v = x[0].shape[0]
    wide = tuple(one[:, None] for one in x)

    def compare(chunk: Any, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes = tuple(columns_ref[t, pl.ds(pl.multiple_of(chunk * k, k), k)][None, :] for t in range(len(x)))
        distance = squared_distances(wide, codes, counts)
        nearer = distance < best[0]
        return jnp.where(nearer, distance, best[0]), jnp.where(nearer, chunk, best[1])

    start = jnp.full((v, k), jnp.inf, jnp.float32), jnp.zeros((v, k), jnp.int32)
    distance, chunk = jax.lax.fori_loop(0, pl.cdiv(n, k) if chunks is None else chunks, compare, start)
    least, code = least_of(distance, chunk * k + jax.lax.broadcasted_iota(jnp.int32, (v, k), 1), 2**31 - 1)
    return code, least


def leaves_of_vectors(x: Vectors, refs: SearchTrees) -> list[jax.Array]:
    """Returns the leaf int32 [v] of every vector in each of the trees; the trees are descended side by side."""
    trees, g, dims = refs.directions.shape
    depth = refs.cuts.shape[1].bit_length()

    def coordinate(tree: int, d: int) -> jax.Array:
        total = x[0] * refs.directions[tree, 0, d]
        for t in range(1, g):
            total += x[t] * refs.directions[tree, t, d]
        return total

    along = [[coordinate(tree, d) for d in range(dims)] for tree in range(trees)]
    nodes = [jnp.zeros(x[0].shape, jnp.int32)] * trees
    for level in range(depth):
        for tree in range(trees):
            cut = plgpu.load(refs.cuts.at[tree, nodes[tree]])
            nodes[tree] = 2 * nodes[tree] + 1 + (along[tree][level % dims] > cut).astype(jnp.int32)
    return [node - ((1 << depth) - 1) for node in nodes]


def _among_listed(x: Vectors, refs: SearchTrees, k: int, best: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the code int32 [v] of the nearest code on the lists of all trees, or that of `best` if none is nearer.

    Args:
      x: the vectors, [v] each.
      refs: references to the trees.
      k: codes compared at a time.
      best: a code int32 [v] and its squared distance [v].
    """
    v, (trees, _, g, b), lists = x[0].shape[0], refs.codes.shape, refs.searched.shape[2]
    wide, leaves = tuple(one[:, None] for one in x), leaves_of_vectors(x, refs)
    place = jax.lax.broadcasted_iota(jnp.int32, (v, k), 1)

    def search(tree: Any, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        leaf = leaves[0]
        for other in range(1, trees):
            leaf = jnp.where(tree == other, leaves[other], leaf)
        leaf = jnp.broadcast_to(leaf[:, None], (v, k))

        def compare(chunk: Any, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            at = chunk * k + place
            exists = None if lists * b % k == 0 else at < lists * b
            where = plgpu.load(refs.searched.at[tree, leaf, at // b], mask=exists, other=None if exists is None else 0)
            other = None if exists is None else jnp.inf
            codes = tuple(plgpu.load(refs.codes.at[tree, where, t, at % b], mask=exists, other=other) for t in range(g))
            distance = squared_distances(wide, codes)
            nearer = distance < best[0]
            return jnp.where(nearer, distance, best[0]), jnp.where(nearer, where * b + at % b, best[1])

        start = jnp.full((v, k), jnp.inf, jnp.float32), jnp.zeros((v, k), jnp.int32)
        distance, places = jax.lax.fori_loop(0, pl.cdiv(lists * b, k), compare, start)
        found, where = least_of(distance, places, refs.order.shape[1] - 1)
        nearer = found < best[1]
        code = jnp.where(nearer, plgpu.load(refs.order.at[tree, where]), best[0])
        return code, jnp.where(nearer, found, best[1])

    code: jax.Array = jax.lax.fori_loop(0, trees, search, best)[0]
    return code


def _walk_kernel(*refs: Ref, cut: _Cut, tile: WalkConfig, trees: bool, previous: bool) -> None:
    """Chooses the codes of some vectors of every channel, the last channel first."""
    base_ref, value_ref, weights_ref, columns_ref, *more, code_ref, delta_ref = refs
    held_ref = more.pop() if previous else None
    v, rows = tile.vectors, next_power(cut.r)
    first = pl.program_id(0) * v
    vector, last = span(first, v), first + v >= cut.c
    exists, row = vector < cut.c, span(0, rows)
    ends = jnp.where(vector == cut.c - 1, cut.partial, cut.g) if cut.partial else None
    counts = None if ends is None else tuple((ends > t).astype(jnp.float32)[:, None] for t in range(cut.g))

    def take(ref: Ref, i: Any) -> Vectors:
        return tuple(plgpu.load(ref.at[i, vector * cut.g + t], mask=exists, other=0) for t in range(cut.g))

    def looked_up(code: jax.Array) -> Vectors:
        return tuple(plgpu.load(columns_ref.at[t, code]) for t in range(cut.g))

    def nearest(x: Vectors, i: Any) -> jax.Array:
        if not trees:
            return among_all(x, columns_ref, cut.n, tile.codes, counts)[0]
        zero = jnp.zeros((v,), jnp.int32)
        held = zero if held_ref is None else plgpu.load(held_ref.at[i, vector], mask=exists, other=0)
        code = _among_listed(x, SearchTrees(*more), tile.codes, (held, squared_distances(x, looked_up(held))))
        if not cut.partial:
            return code
        # Lists are made for whole vectors: one that extends past the outputs is compared with all codes.
        chunks = jnp.where(last, jnp.int32(pl.cdiv(cut.n, tile.codes)), jnp.int32(0))
        whole, _ = among_all(x, columns_ref, cut.n, tile.codes, counts, chunks)
        return jnp.where(vector == cut.c - 1, whole, code)

    def walk(turn: Any, delta: Vectors) -> Vectors:
        i = cut.r - 1 - turn
        weights = plgpu.load(weights_ref.at[i, row], mask=row < cut.r, other=0)[:, None]
        base = take(base_ref, i)
        x = tuple(base[t] + jnp.sum(weights * delta[t], axis=0) for t in range(cut.g))
        code = nearest(x, i)
        plgpu.store(code_ref.at[i, vector], code, mask=exists)
        value, quantized = take(value_ref, i), looked_up(code)
        here, new = (row == i)[:, None], tuple(value[t] - quantized[t] for t in range(cut.g))
        for t in range(cut.g):
            plgpu.store(delta_ref.at[i, vector * cut.g + t], new[t], mask=exists)
        return tuple(jnp.where(here, new[t][None, :], delta[t]) for t in range(cut.g))

    jax.lax.fori_loop(0, cut.r, walk, (jnp.zeros((rows, v), jnp.float32),) * cut.g)


def walk_nearest(
    base: jax.Array,
    value: jax.Array,
    weights: jax.Array,
    codebook: jax.Array,
    trees: SearchTrees | None,
    previous: jax.Array | None,
    *,
    outputs: int,
    tile: WalkConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (codes int32 [r, c], deltas float32 [r, c * g]) of a walk; deltas past the outputs mean nothing.

    Args:
      base, value: float32 [r, c * g].
      weights: float32 [r, r]; only those of later rows, j > i, are used.
      codebook: float32 [n, g], finite.
      trees: over the codes. None: every vector is compared with all codes.
      previous: int32 [r, c], codes that are kept unless the trees have a nearer one; without trees not read.
      outputs: o; what a last vector has past it does not count.
      tile: how the walk is cut into programs.
    """
    (r, width), (n, g) = base.shape, codebook.shape
    cut = _Cut(r, width // g, g, n, outputs % g)
    held = [] if previous is None or trees is None else [previous]
    compared = n if trees is None else trees.codes.shape[0] * trees.codes.shape[3] * trees.searched.shape[2]
    launch = launcher(
        partial(_walk_kernel, cut=cut, tile=tile, trees=trees is not None, previous=bool(held)),
        "code_walk_nearest",
        grid=(pl.cdiv(cut.c, tile.vectors),),
        out=[((r, cut.c), jnp.int32), (base.shape, jnp.float32)],
        num_warps=tile.num_warps,
        num_stages=2,
        interpret=interpret,
        operations=r * cut.c * (compared * (2 * g + 3) + 2 * next_power(r) * g),
        moved=4 * (3 * r * width + 2 * r * cut.c + r * r + n * g),
    )
    codes, delta = launch(base, value, weights, columns_of(codebook, tile.codes), *(trees or ()), *held)
    return codes, delta


def columns_of(codebook: jax.Array, k: int) -> jax.Array:
    """Returns the codes float32 [g, n'], n' a multiple of k, those that fill it at infinity."""
    return jnp.pad(codebook.T, ((0, 0), (0, -len(codebook) % k)), constant_values=jnp.inf)
