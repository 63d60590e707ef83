"""Loss functions, float32 whatever comes in."""

from typing import Protocol

import jax
import jax.numpy as jnp

BLOCK_ERROR = "mean squared error"
"""What `block_error` is called in a report."""


class BlockErrorSettings(Protocol):
    """What `block_error` reads of a config of tuning or clustering."""

    @property
    def massive_activation_limit(self) -> float:
        """See `token_weights`."""
        ...


def token_weights(outputs: jax.Array, limit: float, valid: jax.Array | None = None) -> jax.Array:
    """Returns the weight of every position, float32 [b, t], 0 to 1: min(1, limit median / mean square) of its output.

    A few positions, above all the first, carry activations thousands of times as large as all others (Sun et al.,
    2024). The next norm divides them away, but without weights they alone would decide the squared error.

    Args:
      outputs: [b, t, d] of the original block; the median is that of the sample.
      limit: positions of up to this many times the median have weight 1; 0: all have.
      valid: [b, t], above 0 where a position counts in the median; None: all do.
    """
    squares = jnp.mean(jnp.square(outputs.astype(jnp.float32)), axis=-1)
    if not limit:
        return jnp.ones_like(squares)
    median = jnp.median(squares, axis=-1, keepdims=True) if valid is None else _median(squares, valid)
    return jnp.minimum(1.0, limit * median / jnp.maximum(squares, 1e-30))


def _median(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the median [b, 1] of the values [b, t] where `valid` is above 0; there is one in each row."""
    last = jnp.sum(valid > 0, axis=-1, keepdims=True) - 1
    ordered = jnp.sort(jnp.where(valid > 0, values, jnp.inf), axis=-1)
    middle = [jnp.take_along_axis(ordered, i, axis=-1) for i in (last // 2, (last + 1) // 2)]
    return 0.5 * (middle[0] + middle[1])


def mean_squared_error(
    prediction: jax.Array,
    target: jax.Array,
    *,
    massive_activation_limit: float = 0.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Returns mean((prediction - target)^2), float32 scalar, over all entries (paper eq. 4).

    Args:
      prediction: [b, t, d].
      target: [b, t, d].
      massive_activation_limit: positions are weighted by `token_weights` of the target.
      weights: float32 [b, t], weights of the positions in addition, 0 at padding; None: 1.
    """
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    squares = difference * difference
    if massive_activation_limit:
        squares = token_weights(target, massive_activation_limit, weights)[..., None] * difference * difference
    return jnp.mean(squares if weights is None else weights[..., None] * squares)


def block_error(
    outputs: jax.Array, targets: jax.Array, *, settings: BlockErrorSettings, weights: jax.Array | None = None
) -> jax.Array:
    """Returns how far a block's outputs are from their targets, float32 scalar: tuning minimises it, a run reports it.

    Args:
      outputs: [b, t, d] of the compressed block.
      targets: [b, t, d].
      settings: which positions weigh less.
      weights: as of `mean_squared_error`.
    """
    limit = settings.massive_activation_limit
    return mean_squared_error(outputs, targets, massive_activation_limit=limit, weights=weights)


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p(target), float32 [...], in nats, of logits [..., vocab] and targets int [...]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def divergence(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """Returns KL(softmax(teacher / temperature) || softmax(student / temperature)), float32 [...], in nats.

    Args:
      teacher: logits [..., vocab].
      student: logits [..., vocab].
      temperature: > 0. The gradient falls with its square, which a mixture compensates (Hinton et al., 2015,
        section 2).
    """
    expected = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    found = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)
