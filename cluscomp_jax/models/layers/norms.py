"""RMSNorm in the three ways in which decoders multiply by its weight, and LayerNorm. Knows no parameter tree."""

from typing import Literal

import jax
import jax.numpy as jnp

NormWeight = Literal["cast", "float32", "offset"]
"""Where the weight w is multiplied: "cast" after the cast to the dtype of x (Llama); "float32" before it (OLMo 2);
"offset" before it too, and 1 + w in place of w (Gemma)."""


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, way: NormWeight = "cast") -> jax.Array:
    """Returns x / sqrt(mean(x^2) + eps) * weight in the dtype of x; the division is float32 (arXiv 1910.07467).

    Args:
      x: [..., d].
      weight: [d].
      eps: at least 0.
      way: see `NormWeight`.
    """
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if way == "cast":
        return scaled.astype(x.dtype) * jnp.asarray(weight).astype(x.dtype)
    factor = jnp.asarray(weight).astype(jnp.float32)
    return (scaled * (1.0 + factor if way == "offset" else factor)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    """Returns (x - mean(x)) / sqrt(var(x) + eps) * weight + bias in the dtype of x, computed in float32 (arXiv
    1607.06450).

    Args:
      x: [..., d].
      weight, bias: [d]; None: 1 and 0.
      eps: at least 0.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * jnp.asarray(weight).astype(jnp.float32)
    if bias is not None:
        y = y + jnp.asarray(bias).astype(jnp.float32)
    return y.astype(x.dtype)
