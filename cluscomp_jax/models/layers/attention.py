"""Causal grouped-query attention over given queries, keys and values. Knows nothing of projections, ropes or caches.

Letters: b batch, t query time, s key time, q query heads, k key-value heads, r = q / k queries per key-value head,
h head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_HIDDEN = float(np.finfo(np.float32).min)
_SEGMENT = 64
"""Fewest queries that are worth a segment of their own. Changes the speed only."""
_MAX_SEGMENTS = 8
"""Most segments of one sequence: each is compiled for itself. Changes the speed only."""
_KEPT_WEIGHTS = 2**27
"""Most softmax weights of a sequence that a gradient keeps; more are computed again in the backward pass."""


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


def causal_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Returns `attention` of a whole sequence under its causal mask, [b, t, q, h].

    Cut into segments of queries, each against only the keys that it may read: about half the work, and scores
    that stay in the cache of a CPU.

    Args:
      queries: [b, t, q, h].
      keys: [b, k, t, h].
      values: [b, k, t, h].
      window: see `causal_mask`.
      scale, softcap: see `attention`.
    """
    b, t, q, _ = queries.shape
    plain = partial(attention, scale=scale, softcap=softcap)
    attend = plain if b * q * t * t <= _KEPT_WEIGHTS else jax.checkpoint(plain)
    size = max(_SEGMENT, -(-t // _MAX_SEGMENTS))
    segments = []
    for begin in range(0, t, size):
        end = min(begin + size, t)
        first = 0 if window is None else max(0, begin - window + 1)
        mask = causal_mask(jnp.arange(begin, end), jnp.arange(first, end), window)
        segments.append(attend(queries[:, begin:end], keys[:, :, first:end], values[:, :, first:end], mask))
    return jnp.concatenate(segments, axis=1)


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Returns softmax(scale * queries keys^T) values, [b, t, q, h] in the dtype of the queries.

    Scores and softmax are float32. Query head j reads key-value head j // (q / k); keys and values are never
    repeated: the queries that share a head are rows of one matrix product.

    Args:
      queries: [b, t, q, h].
      keys: [b, k, s, h].
      values: [b, k, s, h].
      mask: bool [t, s], at least one True in every row.
      scale: of the scores, > 0; None: 1 / sqrt(h).
      softcap: c > 0: scores become c tanh(score / c) before the mask (arXiv 2408.00118, section 2); None: they stay.
    """
    b, t, q, h = queries.shape
    k = keys.shape[1]
    rows = queries.reshape(b, t, k, q // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, q // k * t, h)
    mixed = _attend(h**-0.5 if scale is None else scale, softcap, rows, keys, values, mask)
    return mixed.reshape(b, k, q // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, q, h)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    scale: float, softcap: float | None, rows: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attention of query rows [b, k, r*t, h], the mask [t, s] repeated r times, to keys and values [b, k, s, h]."""
    return _attend_forward(scale, softcap, rows, keys, values, mask)[0]


def _scores(scale: float, rows: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.einsum("bkmh,bksh->bkms", rows, keys, preferred_element_type=jnp.float32) * scale


def _attend_forward(
    scale: float, softcap: float | None, rows: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    t, s = mask.shape
    scores = _scores(scale, rows, keys)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores.reshape(*scores.shape[:2], -1, t, s), _HIDDEN).reshape(scores.shape)
    # The division by the sum comes after the product with the values: it then costs [.., h] and not [.., s].
    powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(powers, axis=-1, keepdims=True)
    powers = powers.astype(rows.dtype)
    mixed = jnp.einsum("bkms,bksh->bkmh", powers, values, preferred_element_type=jnp.float32) / total
    return mixed.astype(rows.dtype), (rows, keys, values, powers, total, mixed)


def _attend_backward(
    scale: float, softcap: float | None, saved: tuple[jax.Array, ...], d_mixed: jax.Array
) -> tuple[jax.Array | None, ...]:
    rows, keys, values, powers, total, mixed = saved
    scaled = d_mixed.astype(jnp.float32) / total
    # What the softmax takes off, the sum over s of weight * d_weight, is that over h of output * its gradient.
    shift = jnp.sum(scaled * mixed, axis=-1, keepdims=True)
    scaled = scaled.astype(rows.dtype)
    d_values = jnp.einsum("bkms,bkmh->bksh", powers, scaled)
    d_weights = jnp.einsum("bkmh,bksh->bkms", scaled, values, preferred_element_type=jnp.float32)
    d_scores = powers.astype(jnp.float32) * ((d_weights - shift) * scale)
    if softcap is not None:
        # The scores before the cap are computed again: kept, they would take twice the memory of the weights.
        d_scores = d_scores * (1 - jnp.tanh(_scores(scale, rows, keys) / softcap) ** 2)
    d_scores = d_scores.astype(rows.dtype)
    d_rows = jnp.einsum("bkms,bksh->bkmh", d_scores, keys)
    d_keys = jnp.einsum("bkms,bkmh->bksh", d_scores, rows)
    return d_rows, d_keys, d_values, None


_attend.defvjp(_attend_forward, _attend_backward)
