"""The GPU kernel that searches paths of a trellis for one channel, by Viterbi's algorithm.

A code is a window of L bits of a stream, and every step adds b bits: of code s the low b bits leave, s' = (s >> b) |
(k << (L - b)). The high L - b bits of a code are its head. With B_t[o] the least error of any path whose code at step t
has the head o,

    B_t[o] = min_p ( B_{t-1}[s mod 2^(L-b)] + |x_t - code[s]|^2 ),   s = (o << b) | p.

A channel is cut into strips of t steps, and one launch searches every other strip. The program of a strip searches a
window, the strip and a margin on either side, and keeps the codes of the strip. Where the heads at both ends of a
window are held, its codes and those around it remain one stream.

The target of a channel is computed here, from the deltas of the channels after it (`pallas_kernels.code_walk.nearest`).
Targets, and the p of every head and step, are in memory of their own for every program; barriers order what it writes
and reads again.

Letters: r channels of a block (rows), c' steps of a channel with its padding, g weights per code; q strips of a launch,
windows of w steps; n = 2^L codes, no = 2^(L-b) heads, nk = 2^b values of p. Checks no shapes.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Ref, launcher, pl, plgpu, span
from pallas_kernels.code_walk.config import next_power

_ROWS = 16
"""Rows of deltas that are read at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Which strips a launch searches, and how; static.

    Attributes:
      first: the column of the first strip's first step.
      strips: q.
      steps: t of a strip; the next strip begins 2 t later.
      margin: steps of a window before and after its strip.
      held: whether the heads at both ends of a window are those of the codes around it. Else any will do.
      begin, end: the columns where the channel itself begins and ends; what is outside is padding.
    """

    first: int
    strips: int
    steps: int
    margin: int
    held: bool
    begin: int
    end: int

    @property
    def width(self) -> int:
        """w."""
        return self.steps + 2 * self.margin


@dataclasses.dataclass(frozen=True)
class _Window:
    """What is static of a walk: its letters. Tensors over all codes are [low, mid, heads of a column]."""

    r: int
    w: int
    g: int
    window_bits: int
    step_bits: int

    @property
    def heads(self) -> int:
        return 1 << (self.window_bits - self.step_bits)

    @property
    def tails(self) -> int:
        return 1 << self.step_bits

    @property
    def padded(self) -> int:
        return next_power(self.w)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a tensor over all codes: p first, so that a thread has all p of a head where there are many heads."""
        no, nk = self.heads, self.tails
        return (nk, nk, no // nk) if no >= nk else (nk // no, no, no)

    def places(self) -> tuple[jax.Array, jax.Array]:
        """Returns (p, head) int32 [*shape] of every code."""
        first, second, third = (jax.lax.broadcasted_iota(jnp.int32, self.shape, axis) for axis in range(3))
        if self.heads >= self.tails:
            return first, second * self.shape[2] + third
        return first * self.heads + second, third

    def spread(self, costs: jax.Array) -> jax.Array:
        """Returns B[s mod no] [*shape] of B [no]."""
        if self.heads >= self.tails:
            by_tail = costs.reshape(self.heads // self.tails, self.tails).T
            return jax.lax.broadcast_in_dim(by_tail, self.shape, (0, 2))
        return jax.lax.broadcast_in_dim(costs, self.shape, (1,))

    def least(self, values: jax.Array) -> jax.Array:
        """Returns the minimum over p [no] of values [*shape]."""
        if self.heads >= self.tails:
            return jnp.min(values, axis=0).reshape(self.heads)
        return jnp.min(jnp.min(values, axis=0), axis=0)

    def back(self, by_head: jax.Array) -> jax.Array:
        """Returns values [*shape], the same for every p, of values by head [no]."""
        if self.heads >= self.tails:
            return jax.lax.broadcast_in_dim(by_head.reshape(self.shape[1:]), self.shape, (1, 2))
        return jax.lax.broadcast_in_dim(by_head, self.shape, (2,))


def _paths_kernel(*refs: Ref, cut: _Window, launch: Launch, barrier: Any) -> None:
    """Chooses the codes of one strip of one row."""
    base_ref, value_ref, counts_ref, weights_ref, columns_ref, turn_ref, _, _, *out = refs
    code_ref, delta_ref, target_ref, tail_ref = out
    q, head, step = pl.program_id(0), span(0, cut.heads), span(0, cut.padded)
    begin, i = launch.first - launch.margin + q * (2 * launch.steps), cut.r - 1 - turn_ref[0]
    inside, (p, of_code) = step < cut.w, cut.places()
    kept = (step >= launch.margin) & (step < launch.margin + launch.steps)
    codes = tuple(plgpu.load(columns_ref.at[d, of_code * cut.tails + p]) for d in range(cut.g))

    def add_rows(turn: Any, total: jax.Array, d: int) -> jax.Array:
        before = ((i + 1) // _ROWS + turn) * _ROWS
        row = before + span(0, _ROWS)
        weight = plgpu.load(weights_ref.at[i, row], mask=(row > i) & (row < cut.r), other=0)
        rows, steps = (jax.lax.broadcasted_iota(jnp.int32, (_ROWS, cut.padded), axis) for axis in range(2))
        later = (before + rows > i) & (before + rows < cut.r) & (steps < cut.w)
        deltas = plgpu.load(delta_ref.at[before + rows, d, begin + steps], mask=later, other=0)
        return total + jnp.sum(weight[:, None] * deltas, axis=0)

    def forward(t: Any, costs: jax.Array) -> jax.Array:
        total = cut.spread(costs)
        for d in range(cut.g):
            total = total + jnp.square(target_ref[q, d, t] - codes[d]) * counts_ref[d, begin + t]
        least = cut.least(total)
        tail = cut.least(jnp.where(total == cut.back(least), p, cut.tails))
        plgpu.store(tail_ref.at[q, t, head], tail.astype(tail_ref.dtype))
        return least

    def back(turn: Any, last: jax.Array) -> jax.Array:
        t = cut.w - 1 - turn
        code = (last << cut.step_bits) | tail_ref[q, t, last].astype(jnp.int32)
        keeps = (t >= launch.margin) & (t < launch.margin + launch.steps)
        plgpu.store(code_ref.at[i, begin + t], code, mask=keeps)
        return code & (cut.heads - 1)

    for d in range(cut.g):
        target = plgpu.load(base_ref.at[i, d, begin + step], mask=inside, other=0)
        turns = pl.cdiv(cut.r, _ROWS) - (i + 1) // _ROWS
        target = jax.lax.fori_loop(0, turns, partial(add_rows, d=d), target)
        plgpu.store(target_ref.at[q, d, step], target, mask=inside)
    barrier()
    costs = jnp.zeros((cut.heads,), jnp.float32)
    if launch.held:
        entry = code_ref[i, jnp.maximum(begin - 1, 0)] >> cut.step_bits
        costs = jnp.where((head == entry) | (begin <= launch.begin), costs, jnp.inf)
    costs = jax.lax.fori_loop(0, cut.w, forward, costs)
    last = jnp.min(jnp.where(costs == jnp.min(costs), head, cut.heads))
    if launch.held:
        after = begin + cut.w
        following = code_ref[i, jnp.minimum(after, code_ref.shape[1] - 1)] & (cut.heads - 1)
        last = jnp.where(after < launch.end, following, last)
    barrier()
    jax.lax.fori_loop(0, cut.w, back, last)
    barrier()
    chosen = plgpu.load(code_ref.at[i, begin + step], mask=kept, other=0)
    for d in range(cut.g):
        value = plgpu.load(value_ref.at[i, d, begin + step], mask=kept, other=0)
        plgpu.store(delta_ref.at[i, d, begin + step], value - plgpu.load(columns_ref.at[d, chosen]), mask=kept)


def search_strips(
    codes: jax.Array,
    delta: jax.Array,
    base: jax.Array,
    value: jax.Array,
    counts: jax.Array,
    weights: jax.Array,
    codebook: jax.Array,
    turn: jax.Array,
    *,
    launch: Launch,
    step_bits: int,
    num_warps: int = 8,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (codes, delta) with those of some strips of a row chosen anew.

    Args:
      codes: int32 [r, c'], donated.
      delta: float32 [r, g, c'], donated.
      base, value: float32 [r, g, c'], as in a walk of nearest codes.
      counts: float32 [g, c'] >= 0, the weights of the squared errors, 0 for padding.
      weights: float32 [r, r]; only those of later rows, j > i, are used.
      codebook: float32 [n, g], finite, n a power of two.
      turn: int32 [1], the rows after the one that is searched.
      launch: which strips. Where ends are held, a window has at least (L - b) / b steps.
      step_bits: b.
      num_warps: of 32 threads each, of a program.
    """
    (r, g, _), n = base.shape, len(codebook)
    cut = _Window(r, launch.width, g, n.bit_length() - 1, step_bits)
    tails = ((launch.strips, launch.width, cut.heads), jnp.uint8 if step_bits <= 8 else jnp.uint16)
    started = launcher(
        partial(_paths_kernel, cut=cut, launch=launch, barrier=(lambda: None) if interpret else plgpu.debug_barrier),
        "code_paths",
        grid=(launch.strips,),
        out=[
            (codes.shape, jnp.int32),
            (delta.shape, jnp.float32),
            ((launch.strips, g, launch.width), jnp.float32),
            tails,
        ],
        num_warps=num_warps,
        num_stages=2,
        interpret=interpret,
        operations=launch.strips * launch.width * (n * (3 * g + 5) + r * g),
        moved=4 * launch.strips * launch.width * g * (r / 2 + 4),
        input_output_aliases={6: 0, 7: 1},
    )
    found = started(base, value, counts, weights, codebook.T, turn, codes, delta)
    return found[0], found[1]
