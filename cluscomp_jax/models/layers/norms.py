"""RMSNorm in the three ways in which decoders multiply by its weight. Knows no parameter tree."""

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
