"""The key-value cache of one block: plain in a floating dtype, or int8 with one scale per position and head.

An int8 entry x is kept as round(x / s) with s = max |x| / 127 over the head, bfloat16. Knows no attention.
Letters: b batch, t new positions, k key-value heads, s positions of the cache, h head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.models.model import Cache

_LEVELS = 127
_SCALE = "_scale"


def empty(shape: tuple[int, int, int, int], dtype: Any) -> Cache:
    """Returns the cache of `shape` [b, k, s, h], all zeros; `dtype` floating, or int8."""
    cache = {name: jnp.zeros(shape, dtype) for name in ("keys", "values")}
    if np.dtype(dtype) == np.int8:
        cache |= {name + _SCALE: jnp.zeros((*shape[:3], 1), jnp.bfloat16) for name in ("keys", "values")}
    return cache


def write(cache: Cache, keys: jax.Array, values: jax.Array, position: jax.Array | int) -> Cache:
    """Returns the cache with keys and values [b, k, t, h] at `position` and after it."""
    written: Cache = {}
    for name, new in (("keys", keys), ("values", values)):
        parts = _quantised(name, new) if name + _SCALE in cache else {name: new.astype(cache[name].dtype)}
        for part, value in parts.items():
            written[part] = jax.lax.dynamic_update_slice_in_dim(cache[part], value, position, axis=2)
    return written


def read(cache: Cache, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [b, k, s, h] in `dtype`."""

    def whole(name: str) -> jax.Array:
        stored = cache[name].astype(dtype)
        return stored * cache[name + _SCALE].astype(dtype) if name + _SCALE in cache else stored

    return whole("keys"), whole("values")


def _quantised(name: str, new: jax.Array) -> Cache:
    wide = new.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / _LEVELS).astype(jnp.bfloat16)
    divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
    codes = jnp.clip(jnp.round(wide / divisor), -_LEVELS, _LEVELS)  # bfloat16 may have rounded the scale down
    return {name: codes.astype(jnp.int8), name + _SCALE: scale}
