"""Viterbi's algorithm (Viterbi 1967; Forney 1973) over the windows of a bit stream, for one channel or many segments.

A code is a window of L bits, and every step adds b bits: of code s, the low b bits leave, and k enters above them,
s' = (s >> b) | (k << (L - b)). So all 2^b codes with the same high L - b bits o = s >> b have the same successors, the
codes with o in their low bits. They share one minimum: with B_t[o] the least error of any path whose code at
step t has the high bits o,

    B_t[o] = min_p ( B_{t-1}[s mod 2^(L-b)] + |x_t - code[s]|^2 ),   s = (o << b) | p,

a step costs (2 + 2g) 2^L operations and not 2^(L+b). Only the B are kept: on the way back the 2^b candidates of one
step are computed again.

One channel is cut into segments that advance side by side, one in each lane. A segment begins some steps early, without
knowing what comes before it: after a few windows the best paths to all codes have one origin. On the way back every
segment ends in the code that the next one begins with, so that the result is always one stream.

Letters: t steps; c steps of a channel; z lanes (segments); g weights per code; n = 2^L codes; nk = 2^b; no = 2^(L-b).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LANES = 8
"""Segments of one channel: as many float32 as a vector register of a CPU holds."""
_EARLY = 4
"""Windows, L/b steps each, that a segment begins early."""


class Trellis(NamedTuple):
    """L and b: a code has L bits, of which every step replaces b; 1 <= b <= L <= 16. Static."""

    window_bits: int
    step_bits: int

    @property
    def num_codes(self) -> int:
        """n = 2^L."""
        return 1 << self.window_bits

    @property
    def heads(self) -> int:
        """no = 2^(L-b), the values of the bits that two consecutive codes have in common."""
        return 1 << (self.window_bits - self.step_bits)

    @property
    def tails(self) -> int:
        """nk = 2^b, the values of the bits that a step adds."""
        return 1 << self.step_bits


def best_paths(
    targets: jax.Array, codebook: jax.Array, trellis: Trellis, weights: jax.Array | None = None
) -> jax.Array:
    """Returns the codes int32 [t, z] of the path of least squared error in every lane.

    Args:
      targets: float32 [t, g, z].
      codebook: float32 [n, g].
      trellis: L and b.
      weights: float32 [t, g, z] >= 0, of the squared errors; None: 1.
    """
    costs, last = _forward(targets, codebook, trellis, first=None, weights=weights)
    heads = jnp.argmin(last, axis=0).astype(jnp.int32)
    return _backward(targets, codebook, trellis, costs, heads, weights)


def best_path(
    target: jax.Array, codebook: jax.Array, trellis: Trellis, *, weights: jax.Array | None = None, lanes: int = LANES
) -> jax.Array:
    """Returns the codes int32 [c] of a path of nearly the least squared error along one channel.

    Args:
      target: float32 [c * g].
      codebook: float32 [n, g].
      trellis: L and b.
      weights: float32 [c * g] >= 0, of the squared errors, 0 for padding; None: 1.
      lanes: segments that are searched side by side. With 1 the error is the least.
    """
    g = codebook.shape[1]
    c = target.shape[0] // g
    early = _EARLY * -(-trellis.window_bits // trellis.step_bits) if lanes > 1 else 0
    size = -(-c // lanes)
    # Step i of lane l is step c - (lanes - l) * size + i - early of the channel: all padding is in front.
    at = jnp.arange(early + size)[:, None] + (c - (lanes - jnp.arange(lanes)) * size - early)
    steps = target.reshape(c, g)[jnp.maximum(at, 0)].swapaxes(1, 2)
    counts = None if weights is None else weights.reshape(c, g)[jnp.maximum(at, 0)].swapaxes(1, 2)
    costs, last = _forward(steps, codebook, trellis, first=at < 0, weights=counts)
    costs, steps = costs[early:], steps[early:]
    counts = None if counts is None else counts[early:]
    end = jnp.argmin(last, axis=0).astype(jnp.int32)
    if lanes == 1:
        return _backward(steps, codebook, trellis, costs, end, counts).reshape(c)

    def unsettled(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        heads, codes = state
        return jnp.any(heads[:-1] != _entry(codes, trellis)[1:])

    def settle(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        heads, codes = state
        heads = jnp.concatenate([_entry(codes, trellis)[1:], heads[-1:]])
        return heads, _backward(steps, codebook, trellis, costs, heads, counts)

    start = end, _backward(steps, codebook, trellis, costs, end, counts)
    _, codes = jax.lax.while_loop(unsettled, settle, start)
    return codes.T.reshape(-1)[lanes * size - c :]


def _entry(codes: jax.Array, trellis: Trellis) -> jax.Array:
    """Returns the high bits int32 [z] of the code before the first one of every lane."""
    return codes[0] & (trellis.heads - 1)


def _forward(
    targets: jax.Array,
    codebook: jax.Array,
    trellis: Trellis,
    *,
    first: jax.Array | None,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (B before every step [t, no, z], B after the last [no, z]).

    Args:
      first: bool [t, z], steps that are before the beginning.
      weights: float32 [t, g, z] of the errors; None: 1.
    """
    no, nk, (_, g, z) = trellis.heads, trellis.tails, targets.shape
    codes = codebook.reshape(no, nk, g)

    def step(costs: jax.Array, now: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        target, skip, weight = now

        def candidate(p: int) -> jax.Array:
            error = jnp.tile(costs[p::nk], (nk, 1)) if no >= nk else jnp.broadcast_to(costs[p % no], (no, z))
            for d in range(g):
                square = jnp.square(target[d] - codes[:, p, d, None])
                error = error + (square if weight is None else square * weight[d])
            return error

        least = candidate(0)
        for p in range(1, nk):
            least = jnp.minimum(least, candidate(p))
        if skip is not None:
            least = jnp.where(skip, 0.0, least)
        return least, costs

    last, costs = jax.lax.scan(step, jnp.zeros((no, z), jnp.float32), (targets, first, weights))
    return costs, last


def _backward(
    targets: jax.Array,
    codebook: jax.Array,
    trellis: Trellis,
    costs: jax.Array,
    heads: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    """Returns the codes int32 [t, z] of the best path to each lane's last code, which has the high bits `heads`."""
    no, nk, g = trellis.heads, trellis.tails, codebook.shape[1]
    by_head = codebook.reshape(no, nk, g)
    tails = jnp.arange(nk, dtype=jnp.int32)
    lane = jnp.arange(targets.shape[2])

    def step(heads: jax.Array, now: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        target, costs, weight = now
        codes = (heads[:, None] << trellis.step_bits) | tails
        squares = jnp.square(target.T[:, None] - by_head[heads])
        if weight is not None:
            squares = squares * weight.T[:, None]
        error = costs[codes & (no - 1), lane[:, None]] + jnp.sum(squares, axis=2)
        code = codes[lane, jnp.argmin(error, axis=1)]
        return code & (no - 1), code

    return jax.lax.scan(step, heads, (targets, costs, weights), reverse=True)[1]
