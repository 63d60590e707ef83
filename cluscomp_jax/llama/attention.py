"""Causal grouped-query attention over given queries, keys and values. Knows nothing of projections, ropes or caches.

Letters: b batch, t query time, s key time, q query heads, k key-value heads, h head_dim.
"""

import jax
import jax.numpy as jnp
import numpy as np

_HIDDEN = float(np.finfo(np.float32).min)


def causal_mask(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Returns bool [t, s]: True where a query may read a key.

    Args:
      query_positions: int [t].
      key_positions: int [s].
      window: how many latest positions a query reads, itself included (>= 1); None for all.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def attention(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns softmax(queries keys^T / sqrt(h)) values, [b, t, q, h] in the dtype of the queries.

    Scores and softmax are float32. Query head j reads key-value head j // (q / k); keys and values are never
    repeated: the queries that share a head stand in the rows of one matrix product.

    Args:
      queries: [b, t, q, h].
      keys: [b, k, s, h].
      values: [b, k, s, h].
      mask: bool [t, s], at least one True in every row.
    """
    b, t, q, h = queries.shape
    k, s = keys.shape[1:3]
    grouped = queries.reshape(b, t, k, q // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, q // k * t, h)
    scores = jnp.einsum("bkmh,bksh->bkms", grouped, keys, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask, scores.reshape(b, k, q // k, t, s), _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype).reshape(b, k, q // k * t, s)
    mixed = jnp.einsum("bkms,bksh->bkmh", weights, values)
    return mixed.reshape(b, k, q // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, q, h)
