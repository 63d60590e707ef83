"""The result of assigning vectors to codes, and the update of the codebook that follows from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_matmul.config import segment_config
from pallas_kernels.codebook_matmul.strips import sorted_by_code
from pallas_kernels.implementation import kernels_or_definition

_REFILLS_AT_ONCE = 4096
"""Most empty codes that one update moves onto vectors; later updates move the others."""
_ROW = 2**17
"""Most values of one top_k in `largest`. Up to this many XLA does not split top_k into parts; for a GPU the compilation
of the split one never ends between 2^20 and 2^21 values."""


class Blocks(NamedTuple):
    """Vectors float32 [k, m', g] and their weights [k, m']; padding at the end has weight 0 and repeats a vector."""

    vectors: jax.Array
    weights: jax.Array


class Assignment(NamedTuple):
    """An assignment of all vectors of `Blocks` to codes, and what the next codebook needs of it.

    Attributes:
      nearest: int32 [k, m'], the code of every vector.
      certain: bool [k, m'], true where it is proven that no other code is nearer.
      sums: float32 [n, g + 1], by code the weighted sum of (vector - code), then the sum of the weights.
      inertia: float32 scalar, the sum of weight times squared distance.
      worst: int32 [w], places in the flattened blocks of vectors with a large error.
      worst_error: float32 [w], the weighted squared errors of those vectors.
    """

    nearest: jax.Array
    certain: jax.Array
    sums: jax.Array
    inertia: jax.Array
    worst: jax.Array
    worst_error: jax.Array


def squared_lengths(vectors: jax.Array) -> jax.Array:
    """Returns |x|^2 [...] of vectors [..., g], in their dtype."""
    return jnp.sum(jnp.square(vectors), axis=-1)


def add_up(sums: jax.Array, offset: jax.Array, weights: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (sums float32 [n, g + 1] with these vectors added, weighted squared error float32 [m]).

    Sums are of offsets from the code, which are small compared with the code: float32 keeps more of their digits.

    Args:
      sums: float32 [n, g + 1], as in `Assignment`.
      offset: float32 [m, g], vector minus code.
      weights: float32 [m], >= 0.
      index: int32 [m], the codes, below n.
    """
    rows = jnp.concatenate([offset * weights[:, None], weights[:, None]], axis=1)
    return add_by_code(sums, rows, index, mode="promise_in_bounds"), squared_lengths(offset) * weights


def add_by_code(sums: jax.Array, rows: jax.Array, codes: jax.Array, *, mode: str | None = None) -> jax.Array:
    """Returns sums float32 [n, h] with rows float32 [..., h] added to those of their codes int32 [...], below n.

    A scatter-add. On a GPU, where XLA adds by atomics in any order, the rows are sorted by code, and a kernel adds
    those of each code in that order: the same bytes every time.
    """

    def scattered(sums: jax.Array, rows: jax.Array, codes: jax.Array) -> jax.Array:
        return sums.at[codes].add(rows, mode=mode)

    def sorted_sums(sums: jax.Array, rows: jax.Array, codes: jax.Array, *, interpret: bool) -> jax.Array:
        from pallas_kernels.codebook_matmul.triton import segment_sum

        n, h = sums.shape
        order, starts = sorted_by_code(codes.reshape(-1), n, method="scan_unrolled")
        return sums + segment_sum(rows.reshape(-1, h), order, starts, tile=segment_config(n, h), interpret=interpret)

    return kernels_or_definition(scattered, sorted_sums, sums, rows, codes)


def mean_offset(sums: jax.Array) -> jax.Array:
    """Returns the weighted mean offset float32 [n, g] of each code's vectors, 0 for a code without any.

    Args:
      sums: float32 [n, g + 1], as in `Assignment`.
    """
    mass = sums[:, -1:]
    return sums[:, :-1] / jnp.where(mass > 0, mass, 1.0)


@jax.jit
def next_codebook(
    blocks: Blocks,
    codebook: jax.Array,
    velocity: jax.Array,
    assignment: Assignment,
    step: jax.Array,
    momentum: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (codebook float32 [n, g], velocity float32 [n, g], int32 scalar of codes moved onto a vector).

    Lloyd's update with heavy-ball momentum: with a step of 1 and a momentum of 0 every code moves to the mean of its
    vectors. An empty code, one without vectors, moves onto a vector of large error, if that has any error.

    Args:
      blocks: the vectors and weights.
      codebook: float32 [n, g].
      velocity: float32 [n, g], the last move of each code.
      assignment: of all vectors to `codebook`.
      step: scalar, the length of the step in units of Lloyd's, > 0.
      momentum: scalar, the share of the velocity that is kept, 0 to 1.
    """
    velocity = step * mean_offset(assignment.sums) + momentum * velocity
    moved = codebook + velocity
    empty = assignment.sums[:, -1] <= 0
    moved, refilled = jax.lax.cond(
        empty.any(), _refill, lambda codes, empty, *_: (codes, empty), moved, empty, blocks, assignment
    )
    return moved, jnp.where(refilled[:, None], 0.0, velocity), jnp.sum(refilled)


def _refill(
    codebook: jax.Array, empty: jax.Array, blocks: Blocks, assignment: Assignment
) -> tuple[jax.Array, jax.Array]:
    """Puts the empty codes, in order, onto the vectors of largest error; returns the codes and which were moved."""
    most = min(codebook.shape[0], assignment.worst.shape[0], _REFILLS_AT_ONCE)
    error, at = largest(assignment.worst_error, most)
    turn = jnp.cumsum(empty) - 1
    rank = jnp.clip(turn, 0, most - 1)
    taken = empty & (turn < most) & (error[rank] > 0)
    onto = blocks.vectors.reshape(-1, codebook.shape[1])[assignment.worst[at[rank]]]
    return jnp.where(taken[:, None], onto, codebook), taken


def largest(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns (the largest values [count], descending, their places int32 [count]); of equal ones the first is first.

    The result of `jax.lax.top_k`, computed by rows and then over the results of the rows.

    Args:
      values: [w], floating, finite.
      count: 1 to w, and at most half of `_ROW`.
    """
    places = jnp.arange(values.shape[0], dtype=jnp.int32)
    while values.shape[0] > _ROW:
        spare = -values.shape[0] % _ROW
        rows = jnp.pad(values, (0, spare), constant_values=-jnp.inf).reshape(-1, _ROW)
        values, at = jax.lax.top_k(rows, count)
        places = jnp.take_along_axis(jnp.pad(places, (0, spare)).reshape(-1, _ROW), at, axis=1).reshape(-1)
        values = values.reshape(-1)
    values, at = jax.lax.top_k(values, count)
    return values, places[at]
