"""Loss functions, float32 whatever comes in."""

import jax
import jax.numpy as jnp


def mean_squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Returns mean((prediction - target)^2), float32 scalar, over all entries (paper eq. 4)."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference * difference)


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p(target), float32 [...], in nats, of logits [..., vocab] and targets int [...]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
