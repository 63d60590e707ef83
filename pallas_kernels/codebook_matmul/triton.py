"""The GPU kernels of the product, in Pallas for its Triton backend.

Letters: m rows of x; n codes of g weights, in `lanes` >= g, a power of two; W [d_in, d_out]. The side of W that the
codes run along is cut into "groups"; the other is its "rows". A product reads W or its transpose as B [depth, width].
Where a side is no multiple of its tile, loads and stores are masked; where it is, they are not. Checks no shapes and
knows no differentiation.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.backend import Ref, launcher, pl, plgpu, span
from pallas_kernels.codebook_matmul.config import (
    GemmConfig,
    ScatterConfig,
    SegmentConfig,
    padded_group,
    step_period,
)
from pallas_kernels.codebook_matmul.definition import Axis, window_bits

Pair = tuple[Any, Any]
_SCATTER = "codebook_scatter"
_ITEMS = 8
"""Sorted vectors of a code that the fixed-order sum reads at a time: 32 bytes of their order."""
_EXPANDED = 5
"""Most words of a stream that are expanded together; ptxas spilled registers with 11."""


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The layout of W in its index.

    Attributes:
      rows: the side that is not cut.
      weights: the side that is cut into groups of g.
      swapped: the index is [groups, rows], not [rows, groups].
      window: bits of a code that is a window of a stream; 0: the index has the codes themselves.
      step_bits: bits between two windows.
    """

    rows: int
    weights: int
    g: int
    swapped: bool
    window: int = 0
    step_bits: int = 0

    @property
    def lanes(self) -> int:
        return padded_group(self.g)

    @property
    def groups(self) -> int:
        return pl.cdiv(self.weights, self.g)


def _cut(shape: tuple[int, int], num_codes: int, g: int, axis: Axis, step_bits: int | None) -> _Cut:
    bits = (0, 0) if step_bits is None else (window_bits(num_codes), step_bits)
    return _Cut(shape[0], shape[1], g, False, *bits) if axis == "out" else _Cut(shape[1], shape[0], g, True, *bits)


def _limit(size: int, covered: int) -> int | None:
    """Returns where a side ends, None if tiles that come to `covered` at a time end there by themselves."""
    return size if size % covered else None


def _inside(starts: Pair, shape: tuple[int, int], limits: Pair) -> jax.Array | None:
    """Returns which elements of a block are within the limits, None if all."""
    mask = None
    for axis, limit in enumerate(limits):
        if limit is not None:
            side = jax.lax.broadcast_in_dim(span(starts[axis], shape[axis]) < limit, shape, (axis,))
            mask = side if mask is None else mask & side
    return mask


def _load(ref: Ref, starts: Pair, shape: tuple[int, int], limits: Pair) -> jax.Array:
    """Returns a block of a matrix, 0 past the limits."""
    where = (pl.ds(starts[0], shape[0]), pl.ds(starts[1], shape[1]))
    mask = _inside(starts, shape, limits)
    block: jax.Array = ref[where] if mask is None else plgpu.load(ref.at[where], mask=mask, other=0)
    return block


def _lane_places(starts: Pair, shape: tuple[int, int], limits: Pair, cut: _Cut) -> tuple[jax.Array, ...]:
    """Returns (row, weight, whether both exist), each [rows, groups, lanes], of a block of groups."""
    row, group, lane = (jax.lax.broadcasted_iota(jnp.int32, (*shape, cut.lanes), axis) for axis in range(3))
    row, weight = starts[0] + row, (starts[1] + group) * cut.g + lane
    exists = (lane < cut.g) & (weight < cut.weights)
    return row, weight, exists if limits[0] is None else exists & (row < limits[0])


def _load_groups(ref: Ref, starts: Pair, shape: tuple[int, int], limits: Pair, cut: _Cut) -> jax.Array:
    """Returns [rows, groups * lanes] of a matrix whose columns are cut; 0 in lanes past g and past the limits."""
    if cut.g == cut.lanes:
        weights = None if limits[1] is None else cut.weights
        return _load(ref, (starts[0], starts[1] * cut.g), (shape[0], shape[1] * cut.g), (limits[0], weights))
    row, weight, exists = _lane_places(starts, shape, limits, cut)
    return plgpu.load(ref.at[row, weight], mask=exists, other=0).reshape(shape[0], shape[1] * cut.lanes)


def _load_codes(ref: Ref, starts: Pair, shape: tuple[int, int], limits: Pair, cut: _Cut) -> jax.Array:
    """Returns codes [rows, groups]; past the limits any that exist."""
    if cut.window:
        return _load_windows(ref, starts, shape, limits, cut)
    if cut.swapped:
        return _load(ref, starts[::-1], shape[::-1], limits[::-1]).T.astype(jnp.int32)
    return _load(ref, starts, shape, limits).astype(jnp.int32)


def _load_windows(ref: Ref, starts: Pair, shape: tuple[int, int], limits: Pair, cut: _Cut) -> jax.Array:
    """Returns codes [rows, groups] of streams of 32-bit words.

    After `period` groups a window begins with a word again. If that divides the block and is few words, they are loaded
    as blocks [rows, groups / period], one for each word of a period and one for that after it, and expanded in
    registers. Else each window is read from the two words that it may lie in.
    """
    period = step_period(cut.step_bits)
    if shape[1] % period or period * cut.step_bits > 32 * _EXPANDED:
        return _gather_windows(ref, starts, shape, limits, cut)
    words, blocks = period * cut.step_bits // 32, (shape[0], shape[1] // period)
    first = pl.multiple_of(starts[1] * cut.step_bits // 32, blocks[1] * words)
    row, block = (jax.lax.broadcasted_iota(jnp.int32, blocks, axis) for axis in range(2))
    row, block = starts[0] + row, first + block * words
    read = [_load_words(ref, row, block + k, limits, cut) for k in range(words + (cut.window > cut.step_bits))]
    expanded = (*blocks, period)
    bit = jax.lax.broadcasted_iota(jnp.int32, expanded, 2) * cut.step_bits
    place, shift = bit >> 5, (bit & 31).astype(jnp.uint32)
    wide = [jax.lax.broadcast_in_dim(word, expanded, (0, 1)) for word in read]

    def at(places: jax.Array, k: int) -> jax.Array:
        found = wide[k]
        for j in range(1, words):
            if k + j < len(wide):
                found = jnp.where(places == j, wide[k + j], found)
        return found

    bits = at(place, 0) >> shift
    if cut.window > cut.step_bits or words > 1:
        bits = bits | ((at(place, 1) << 1) << (31 - shift))
    return (bits & jnp.uint32((1 << cut.window) - 1)).astype(jnp.int32).reshape(shape)


def _load_words(ref: Ref, row: jax.Array, word: jax.Array, limits: Pair, cut: _Cut) -> jax.Array:
    """Returns the words at (row, word) of the streams, 0 past the limits."""
    mask = None if limits[0] is None else row < cut.rows
    if limits[1] is not None:
        inside = word < ref.shape[0 if cut.swapped else 1]
        mask = inside if mask is None else mask & inside
    where = ref.at[word, row] if cut.swapped else ref.at[row, word]
    words: jax.Array = where[...] if mask is None else plgpu.load(where, mask=mask, other=0)
    return words


def _gather_windows(ref: Ref, starts: Pair, shape: tuple[int, int], limits: Pair, cut: _Cut) -> jax.Array:
    """Returns codes [rows, groups] of streams; each is read from the two words that it may lie in."""
    row = starts[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    bit = (starts[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)) * cut.step_bits
    word, shift = bit >> 5, (bit & 31).astype(jnp.uint32)
    low, high = (_load_words(ref, row, place, (limits[0], 0), cut) for place in (word, word + 1))
    bits = (low >> shift) | ((high << 1) << (31 - shift))
    return (bits & jnp.uint32((1 << cut.window) - 1)).astype(jnp.int32)


def _gather(ref: Ref, codes: jax.Array, cut: _Cut) -> jax.Array:
    """Returns the codebook's vectors [*codes.shape, lanes], 0 in lanes past g."""
    if ref.shape[1] == cut.lanes:
        vectors: jax.Array = ref[codes, :]
        return vectors
    shape = (*codes.shape, cut.lanes)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    vectors = plgpu.load(ref.at[jax.lax.broadcast_in_dim(codes, shape, (0, 1)), lane], mask=lane < cut.g, other=0)
    return vectors


def _gemm_kernel(
    a_ref: Ref, index_ref: Ref, codebook_ref: Ref, out_ref: Ref, *, cut: _Cut, wide: bool, tile: GemmConfig
) -> None:
    """One tile of a @ B, or of its part; `wide`: the codes run along B's width, else along its depth."""
    bm, bn, bk = tile.block_m, tile.block_n, tile.block_k
    m, lanes = a_ref.shape[0], cut.lanes
    m0, part = pl.program_id(0) // tile.splits * bm, pl.program_id(0) % tile.splits
    rows, groups = (bk, bn // lanes) if wide else (bn, bk // lanes)
    step_size, across = (rows, groups) if wide else (groups, rows)
    n0 = pl.program_id(1) * across
    steps = pl.cdiv(cut.rows if wide else cut.groups, step_size * tile.splits)
    m_end = _limit(m, bm)
    row_end = _limit(cut.rows, rows * (tile.splits if wide else 1))
    group_end = cut.groups if cut.weights % (groups * cut.g * (1 if wide else tile.splits)) else None
    read_m, read_end = (1, None) if m == 1 else (bm, m_end)
    precision = jax.lax.Precision.HIGHEST if a_ref.dtype == jnp.float32 else None

    def add_step(step: Any, total: jax.Array) -> jax.Array:
        k0 = (part * steps + step) * step_size
        if wide:
            a = _load(a_ref, (m0, k0), (read_m, bk), (read_end, row_end))
        else:
            a = _load_groups(a_ref, (m0, k0), (read_m, groups), (read_end, group_end), cut)
        # Tensor cores take 16 rows; that of a single token is read once and fills all of them.
        a = jnp.broadcast_to(a, (bm, bk))
        starts = (k0, n0) if wide else (n0, k0)
        codes = _load_codes(index_ref, starts, (rows, groups), (row_end, group_end), cut)
        b = _gather(codebook_ref, codes, cut).reshape(rows, groups * lanes)
        return total + jnp.dot(a, b if wide else b.T, preferred_element_type=jnp.float32, precision=precision)

    total = jax.lax.fori_loop(0, steps, add_step, jnp.zeros((bm, bn), jnp.float32)).astype(out_ref.dtype)
    if wide and cut.g != lanes:
        row, weight, exists = _lane_places((m0, n0), (bm, groups), (m_end, group_end), cut)
        plgpu.store(out_ref.at[part, row, weight], total.reshape(exists.shape), mask=exists)
    else:
        o0, width = (n0 * lanes, cut.weights) if wide else (n0, cut.rows)
        where = (part, pl.ds(m0, bm), pl.ds(o0, bn))
        plgpu.store(out_ref.at[where], total, mask=_inside((m0, o0), (bm, bn), (m_end, _limit(width, bn))))


def gemm(
    a: jax.Array,
    codebook: jax.Array,
    index: jax.Array,
    *,
    shape: tuple[int, int],
    axis: Axis,
    transposed: bool,
    tile: GemmConfig,
    step_bits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns a @ W [m, d_out], or a @ W.T [m, d_in] if `transposed`, in the dtype of a; sums are float32."""
    cut, m = _cut(shape, len(codebook), codebook.shape[1], axis, step_bits), a.shape[0]
    wide = (axis == "out") != transposed
    width = shape[0] if transposed else shape[1]
    codebook = codebook.astype(a.dtype)
    if tile.pad_codebook:
        codebook = jnp.pad(codebook, ((0, 0), (0, cut.lanes - cut.g)))
    tiles_n = pl.cdiv(cut.groups, tile.block_n // cut.lanes) if wide else pl.cdiv(width, tile.block_n)
    launch = launcher(
        partial(_gemm_kernel, cut=cut, wide=wide, tile=tile),
        "codebook_gemm",
        grid=(pl.cdiv(m, tile.block_m) * tile.splits, tiles_n),
        out=((tile.splits, m, width), jnp.float32 if tile.splits > 1 else a.dtype),
        operations=2 * m * math.prod(shape),
        moved=_bytes(a, codebook, index) + m * width * a.dtype.itemsize,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
    )
    return _sum_parts(launch(a, index, codebook)).astype(a.dtype)


def _scatter_kernel(
    rows_ref: Ref, weights_ref: Ref, index_ref: Ref, _zeros: Ref, out_ref: Ref, *, cut: _Cut, tile: ScatterConfig
) -> None:
    """Adds one tile of the gradient of W to its codes."""
    lanes, m = cut.lanes, rows_ref.shape[0]
    shape = (tile.block_row, tile.block_group // lanes)
    starts = (pl.program_id(0) * shape[0], pl.program_id(1) * shape[1])
    m_end, row_end = _limit(m, tile.block_m), _limit(cut.rows, shape[0])
    group_end = cut.groups if cut.weights % (shape[1] * cut.g) else None
    precision = jax.lax.Precision.HIGHEST if rows_ref.dtype == jnp.float32 else None

    def add_step(step: Any, total: jax.Array) -> jax.Array:
        m0 = step * tile.block_m
        rows = _load(rows_ref, (m0, starts[0]), (tile.block_m, shape[0]), (m_end, row_end))
        weights = _load_groups(weights_ref, (m0, starts[1]), (tile.block_m, shape[1]), (m_end, group_end), cut)
        return total + jnp.dot(rows.T, weights, preferred_element_type=jnp.float32, precision=precision)

    zeros = jnp.zeros((shape[0], shape[1] * lanes), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(m, tile.block_m), add_step, zeros)
    codes = _load_codes(index_ref, starts, shape, (row_end, group_end), cut)
    jax.ref.addupdate(out_ref, (codes, slice(None)), total.reshape(*shape, lanes))


def scatter_gradient(
    x: jax.Array,
    dy: jax.Array,
    index: jax.Array,
    *,
    num_codes: int,
    g: int,
    axis: Axis,
    tile: ScatterConfig,
    step_bits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the gradient [n, g], float32, of a codebook; atomic additions, so the order of a sum is not fixed."""
    cut = _cut((x.shape[1], dy.shape[1]), num_codes, g, axis, step_bits)
    _compat.relax_atomics(_SCATTER)  # the order between the additions of one launch means nothing
    rows, weights = (dy, x) if cut.swapped else (x, dy)
    zeros = jnp.zeros((num_codes, cut.lanes), jnp.float32)
    launch = launcher(
        partial(_scatter_kernel, cut=cut, tile=tile),
        _SCATTER,
        grid=(pl.cdiv(cut.rows, tile.block_row), pl.cdiv(cut.groups, tile.block_group // cut.lanes)),
        out=(zeros.shape, zeros.dtype),
        operations=2 * math.prod(x.shape) * dy.shape[1],
        moved=_bytes(x, dy, index, zeros),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        input_output_aliases={3: 0},
    )
    return launch(rows, weights, index, zeros)[:, :g]


def _segment_kernel(
    vectors_ref: Ref, order_ref: Ref, starts_ref: Ref, out_ref: Ref, *, n: int, g: int, tile: SegmentConfig
) -> None:
    """Sums, in order, one part of the vectors of some codes."""
    lanes, part = padded_group(g), pl.program_id(1)
    code = span(pl.program_id(0) * tile.block_codes, tile.block_codes)
    exists = code < n
    first = plgpu.load(starts_ref.at[code], mask=exists, other=0)
    end = plgpu.load(starts_ref.at[code + 1], mask=exists, other=0)
    share = (end - first + tile.splits - 1) // tile.splits
    begin = first + part * share
    end = jnp.minimum(begin + share, end)
    shape = (tile.block_codes, _ITEMS, lanes)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)

    def add_step(step: Any, total: jax.Array) -> jax.Array:
        item = begin[:, None] + step * _ITEMS + jax.lax.broadcasted_iota(jnp.int32, shape[:2], 1)
        wanted = item < jax.lax.broadcast_in_dim(end, shape[:2], (0,))
        place = plgpu.load(order_ref.at[item], mask=wanted, other=0)
        place, wanted = (jax.lax.broadcast_in_dim(value, shape, (0, 1)) for value in (place, wanted))
        return total + plgpu.load(vectors_ref.at[place, lane], mask=wanted & (lane < g), other=0)

    steps = (jnp.max(share) + (_ITEMS - 1)) // _ITEMS
    total = jax.lax.fori_loop(0, steps, add_step, jnp.zeros(shape, jnp.float32)).sum(axis=1)
    code = jax.lax.broadcast_in_dim(code, total.shape, (0,))
    lane = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)
    plgpu.store(out_ref.at[part, code, lane], total, mask=(code < n) & (lane < g))


def segment_sum(
    vectors: jax.Array, order: jax.Array, starts: jax.Array, *, tile: SegmentConfig, interpret: bool = False
) -> jax.Array:
    """Returns the sums [n, g], float32, of sorted vectors by code, each in a fixed order.

    Args:
      vectors: [p, g], float32.
      order: int32 [p], the vectors sorted by code.
      starts: int32 [n+1], where in `order` the vectors of each code begin; p at the end.
    """
    n, g = starts.shape[0] - 1, vectors.shape[1]
    launch = launcher(
        partial(_segment_kernel, n=n, g=g, tile=tile),
        "codebook_segment_sum",
        grid=(pl.cdiv(n, tile.block_codes), tile.splits),
        out=((tile.splits, n, g), jnp.float32),
        operations=vectors.size,
        moved=_bytes(vectors, order, starts) + 4 * n * g,
        num_warps=tile.num_warps,
        num_stages=2,
        interpret=interpret,
    )
    return _sum_parts(launch(vectors, order, starts))


def _bytes(*arrays: jax.Array) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _sum_parts(parts: jax.Array) -> jax.Array:
    """Returns the sum over the first axis, whose size is a power of two, by halves: in a fixed order on any device."""
    while parts.shape[0] > 1:
        half = parts.shape[0] // 2
        parts = parts[:half] + parts[half:]
    return parts[0]
