"""The codebook of a trellis: Viterbi's algorithm and centroids in turn, on a new sample of segments in every round.

The codes begin as vectors of the matrix drawn at random. That is a good trellis already: codes that share bits are as
unlike as any others, so that every path of a few steps has its own place in space. Codes that were spread evenly among
the successors of each code are worse, before and after the rounds (docs/experiments.md).

Letters: r lines of c vectors of g weights; n codes; t steps of a segment, z segments.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.kmeans.assignment import add_by_code
from cluscomp_jax.trellis.viterbi import LANES, Trellis, best_paths
from pallas_kernels.code_walk.config import path_config
from pallas_kernels.implementation import kernels_or_definition

_STEPS = 64
"""Steps of a segment."""
_SEGMENTS_PER_CODE = 0.5
"""Segments of a round, times n: a code is the mean of about 30 vectors."""
_MOMENTUM = 0.7
"""Share of a code's last move that is kept. Lloyd's moves are short here: each code sees few of its paths' changes."""
_LAST_STEP = 0.2
"""The step of the last round in units of Lloyd's; that of the first is 1."""


def fit_codebook(
    lines: jax.Array,
    trellis: Trellis,
    *,
    key: jax.Array,
    weights: jax.Array | None = None,
    place_weights: jax.Array | None = None,
    rounds: int = 20,
) -> jax.Array:
    """Returns a codebook float32 [n, g] of small squared error over paths along the lines.

    Args:
      lines: float32 [r, c, g], finite.
      trellis: L and b.
      key: same key, same codes.
      weights: [r] >= 0, of the squared errors of each line; None: all count the same.
      place_weights: float32 [c, g] >= 0, of those of each place in a line, times the line's; None: 1.
      rounds: >= 0.
    """
    weights = jnp.ones(len(lines), jnp.float32) if weights is None else weights
    codebook = draw(lines, weights, jax.random.fold_in(key, rounds), num_codes=trellis.num_codes)
    velocity = jnp.zeros_like(codebook)
    for turn in range(rounds):
        step = 1.0 + (_LAST_STEP - 1.0) * turn / max(1, rounds - 1)
        codebook, velocity = improve(
            lines, weights, codebook, velocity, jax.random.fold_in(key, turn), step, place_weights, trellis=trellis
        )
    return codebook


@partial(jax.jit, static_argnames="trellis")
def best_codes(
    lines: jax.Array, codebook: jax.Array, place_weights: jax.Array | None = None, *, trellis: Trellis
) -> jax.Array:
    """Returns the codes int32 [r, c] of the path of least squared error along every line [r, c, g] float32.

    `place_weights` as in `fit_codebook`.
    """
    r, c, g = lines.shape
    spare = -r % LANES
    lanes = jnp.pad(lines, ((0, spare), (0, 0), (0, 0))).reshape(-1, LANES, c, g).transpose(0, 2, 3, 1)
    weights = None if place_weights is None else jnp.broadcast_to(place_weights[..., None], (c, g, LANES))
    codes: jax.Array = jax.lax.map(lambda targets: best_paths(targets, codebook, trellis, weights), lanes)
    return codes.transpose(0, 2, 1).reshape(-1, c)[:r]


@partial(jax.jit, static_argnames="num_codes")
def draw(lines: jax.Array, weights: jax.Array, key: jax.Array, *, num_codes: int) -> jax.Array:
    """Returns n vectors of the lines, those of a line as often as the root of its weight."""
    r, c, _ = lines.shape
    of_line, of_place = jax.random.split(key)
    total = jnp.cumsum(jnp.sqrt(weights))
    drawn = jax.random.uniform(of_line, (num_codes,)) * total[-1]
    line = jnp.minimum(jnp.searchsorted(total, drawn), r - 1)
    return lines[line, jax.random.randint(of_place, (num_codes,), 0, c)]


@partial(jax.jit, static_argnames="trellis", donate_argnames=("codebook", "velocity"))
def improve(
    lines: jax.Array,
    weights: jax.Array,
    codebook: jax.Array,
    velocity: jax.Array,
    key: jax.Array,
    step: jax.Array | float,
    place_weights: jax.Array | None = None,
    *,
    trellis: Trellis,
) -> tuple[jax.Array, jax.Array]:
    """Returns (codebook, velocity), both float32 [n, g], after one round."""
    (r, c, g), n = lines.shape, trellis.num_codes
    t, z = min(_STEPS, c), -(-int(_SEGMENTS_PER_CODE * n) // LANES) * LANES
    of_line, of_place = jax.random.split(key)
    line = jax.random.randint(of_line, (z,), 0, r)
    first = jax.random.randint(of_place, (z,), 0, c - t + 1)
    segments = jax.vmap(lambda i, j: jax.lax.dynamic_slice(lines, (i, j, 0), (1, t, g))[0])(line, first)
    own = None
    if place_weights is not None:
        own = jax.vmap(lambda j: jax.lax.dynamic_slice(place_weights, (j, 0), (t, g)))(first)
    codes = _segment_codes(segments, codebook, own, trellis)
    # The ends of a segment are not those of a line: nothing before and after them restricts their codes.
    edge = min(-(-trellis.window_bits // trellis.step_bits), (t - 1) // 2) if t < c else 0
    inner = (jnp.arange(t) >= edge) & (jnp.arange(t) < t - edge)
    mass = jnp.where(inner, weights[line][:, None], 0.0)[..., None]
    mass = mass if own is None else mass * own
    sums = jnp.zeros((n, g + mass.shape[2]), jnp.float32)
    sums = add_by_code(sums, jnp.concatenate([segments * mass, mass], axis=2), codes)
    weight = sums[:, g:]
    move = jnp.where(weight > 0, sums[:, :g] / jnp.where(weight > 0, weight, 1.0) - codebook, 0.0)
    velocity = step * move + _MOMENTUM * velocity
    return codebook + velocity, velocity


def _segment_codes(segments: jax.Array, codebook: jax.Array, weights: jax.Array | None, trellis: Trellis) -> jax.Array:
    """Returns the codes int32 [z, t] of the path of least squared error along every segment float32 [z, t, g].

    `weights` are of the squared errors, float32 [z, t, g]; None: 1.
    """
    z, t, g = segments.shape

    def mapped(segments: jax.Array, codebook: jax.Array, weights: jax.Array | None) -> jax.Array:
        arrays = jax.tree.map(lambda a: a.reshape(-1, LANES, t, g).transpose(0, 2, 3, 1), (segments, weights))
        codes = jax.lax.map(lambda of_lanes: best_paths(of_lanes[0], codebook, trellis, of_lanes[1]), arrays)
        return codes.transpose(0, 2, 1).reshape(z, t)

    def kernel(segments: jax.Array, codebook: jax.Array, weights: jax.Array | None, *, interpret: bool) -> jax.Array:
        tile = path_config(t, g, *trellis)
        if tile is None:
            return mapped(segments, codebook, weights)
        from pallas_kernels.code_walk.trellis import search_segments

        fixed: dict[str, Any] = {"step_bits": trellis.step_bits, "num_warps": tile.num_warps}
        return search_segments(segments, codebook, weights, interpret=interpret, **fixed)

    return kernels_or_definition(mapped, kernel, segments, codebook, weights)
