"""What an assignment of vectors to codes leaves behind, and the codebook that follows from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_REFILLS_AT_ONCE = 4096
"""Most codes refilled after one assignment; the next one sees to the rest."""
_ROW = 2**17
"""Values of which `largest` takes the largest at one time; of so many XLA does not cut its top_k into parts, which for
a GPU never ends between 2^20 and 2^21 values."""


class Blocks(NamedTuple):
    """Vectors float32 [k, m', g] and their weights [k, m']; padding at the end has weight 0 and repeats a vector."""

    vectors: jax.Array
    weights: jax.Array


class Assignment(NamedTuple):
    """An assignment of all vectors of `Blocks` to codes, and what the next codebook needs of it.

    Attributes:
      nearest: int32 [k, m'], the code of every vector.
      certain: bool [k, m'], true where no other code can be nearer.
      sums: [n, g + 1], by code the weighted sum of (vector - code), then of the weights.
      inertia: sum of weight times squared distance.
      worst: int32 [w], places in the flattened blocks of vectors with much error; worst_error [w] their share of it.
    """

    nearest: jax.Array
    certain: jax.Array
    sums: jax.Array
    inertia: jax.Array
    worst: jax.Array
    worst_error: jax.Array


def squared_lengths(vectors: jax.Array) -> jax.Array:
    """Returns |x|^2 of vectors [..., g]."""
    return jnp.sum(jnp.square(vectors), axis=-1)


def add_up(sums: jax.Array, offset: jax.Array, weights: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (sums [n, g + 1] with these added, weighted squared error [m]) of vectors at `offset` from their codes.

    Offsets from the present code are small beside the code: their float32 sums keep more digits.
    """
    rows = jnp.concatenate([offset * weights[:, None], weights[:, None]], axis=1)
    return sums.at[index].add(rows, mode="promise_in_bounds"), squared_lengths(offset) * weights


def mean_offset(sums: jax.Array) -> jax.Array:
    """Returns the weighted mean offset [n, g] of each code's vectors, 0 for a code without any."""
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
    """Returns (codebook [n, g], velocity [n, g], codes refilled): Lloyd's update as a heavy ball.

    With a step of 1 and a momentum of 0 every code moves to the mean of its vectors. A code without vectors moves onto
    one of the worst vectors, if that has any error.
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
    """Returns (the largest values [count] in falling order, their places int32); of equal ones the first comes first.

    The same as `jax.lax.top_k`, of rows first and of what they leave then.

    Args:
      values: [w], finite.
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
