"""A walk of trellis paths over whole channels, by the kernel that walks strips of them.

A channel is cut into strips of equal length. The even strips are searched first, then the odd ones between them, which
are held at the heads of their neighbours' codes; so every channel remains one stream, and an odd strip's path is the
best there is between its neighbours.

An even strip is searched with a margin on either side and free ends. So its path is chosen with a view to what comes
before and after it, as a search of the whole channel would. The targets of a margin follow from the errors of the odd
strips, so that both kinds of strips advance together, in two launches a row. Strips that walk a whole block by
themselves need 64 times fewer launches, but do not know their neighbours' targets: the output error was 1.2% larger
with strips of 64 steps, 2.4% with 32 (docs/kernels.md).

Letters: r channels of a block, c codes of a channel, g weights per code.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.code_walk.config import PathConfig
from pallas_kernels.code_walk.paths import Launch, search_strips


def walk_trellis(
    base: jax.Array,
    value: jax.Array,
    weights: jax.Array,
    codebook: jax.Array,
    output_weights: jax.Array,
    *,
    step_bits: int,
    tile: PathConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (codes int32 [r, c], deltas float32 [r, c * g]) of a walk; deltas of padding mean nothing.

    Args:
      base, value: float32 [r, c * g].
      weights: float32 [r, r]; only those of later rows, j > i, are used.
      codebook: float32 [n, g], finite, n a power of two.
      output_weights: float32 [c * g] >= 0, of the squared errors, 0 for padding.
      step_bits: b.
      tile: how channels are cut.
    """
    (r, width), g = base.shape, codebook.shape[1]
    c, t = width // g, tile.steps
    pairs, margin = -(-c // (2 * t)), tile.margin
    after = 2 * pairs * t + margin - c

    def padded(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(margin, after)])

    base, value = (padded(array.reshape(r, c, g).swapaxes(1, 2)) for array in (base, value))
    counts = padded(output_weights.reshape(c, g).T)
    strips: dict[str, Any] = {"strips": pairs, "steps": t, "begin": margin, "end": margin + c}
    even = Launch(first=margin, margin=margin, held=False, **strips)
    odd = Launch(first=margin + t, margin=0, held=True, **strips)
    fixed: dict[str, Any] = {"step_bits": step_bits, "num_warps": tile.num_warps, "interpret": interpret}

    def walk_row(turn: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        for launch in (even, odd) if c > t else (even,):
            state = search_strips(
                state[0], state[1], base, value, counts, weights, codebook, turn.reshape(1), launch=launch, **fixed
            )
        return state

    nothing = padded(jnp.zeros((r, c), jnp.int32)), padded(jnp.zeros((r, g, c), jnp.float32))
    codes, delta = jax.lax.fori_loop(0, r, walk_row, nothing)
    real = slice(margin, margin + c)
    return codes[:, real], delta[:, :, real].swapaxes(1, 2).reshape(r, width)


def search_segments(
    segments: jax.Array,
    codebook: jax.Array,
    weights: jax.Array | None = None,
    *,
    step_bits: int,
    num_warps: int,
    interpret: bool = False,
) -> jax.Array:
    """Returns the codes int32 [z, t] of the path of least squared error along every segment float32 [z, t, g].

    The segments are the strips of one channel, with free ends; z is even.

    Args:
      segments: the targets.
      codebook: float32 [n, g], finite, n a power of two.
      weights: float32 [z, t, g] >= 0, of the squared errors; None: 1.
      step_bits: b.
      num_warps: of 32 threads each, of a program.
    """
    z, t, g = segments.shape
    targets = segments.reshape(1, z * t, g).swapaxes(1, 2)
    counts = jnp.ones((g, z * t)) if weights is None else weights.reshape(z * t, g).T
    state = jnp.zeros((1, z * t), jnp.int32), jnp.zeros_like(targets)
    alone, turn = jnp.zeros((1, 1)), jnp.zeros((1,), jnp.int32)
    fixed: dict[str, Any] = {"step_bits": step_bits, "num_warps": num_warps, "interpret": interpret}
    for first in (0, t):
        launch = Launch(first=first, strips=z // 2, steps=t, margin=0, held=False, begin=0, end=z * t)
        arrays = (targets, targets, counts, alone, codebook, turn)
        state = search_strips(state[0], state[1], *arrays, launch=launch, **fixed)
    return state[0].reshape(z, t)
