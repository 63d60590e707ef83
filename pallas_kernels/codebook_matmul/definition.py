"""The definition in jnp: decode, and the gradient of a codebook. The only decode there is, and the CPU path.

Letters: n codes, g weights per code, d_in, d_out the sides of the matrix, p = ceil(cut side / g) vectors
along the cut side.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Axis = Literal["out", "in"]


def decode(codebook: jax.Array, index: jax.Array, *, shape: tuple[int, int], axis: Axis) -> jax.Array:
    """Returns W [d_in, d_out] in the codebook's dtype.

    Args:
      codebook: [n, g].
      index: integer, [d_in, p] for axis "out", [p, d_out] for axis "in"; every entry < n.
      shape: (d_in, d_out).
      axis: "out": W[i, j*g+t] = codebook[index[i, j], t]; "in": W[j*g+t, o] = codebook[index[j, o], t].
    """
    d_in, d_out = shape
    g = codebook.shape[1]
    vectors = codebook.at[index.astype(jnp.int32)].get(mode="promise_in_bounds")
    if axis == "out":
        return vectors.reshape(d_in, index.shape[1] * g)[:, :d_out]
    return vectors.transpose(0, 2, 1).reshape(index.shape[0] * g, d_out)[:d_in]


def codebook_gradient(d_weight: jax.Array, index: jax.Array, *, num_codes: int, g: int, axis: Axis) -> jax.Array:
    """Returns the gradient [n, g], float32, of a codebook from that of its decoded matrix [d_in, d_out]."""
    d_in, d_out = d_weight.shape
    if axis == "out":
        padded = jnp.pad(d_weight, ((0, 0), (0, index.shape[1] * g - d_out)))
        vectors = padded.reshape(-1, g)
    else:
        padded = jnp.pad(d_weight, ((0, index.shape[0] * g - d_in), (0, 0)))
        vectors = padded.reshape(index.shape[0], g, d_out).transpose(0, 2, 1).reshape(-1, g)
    zeros = jnp.zeros((num_codes, g), jnp.float32)
    flat = index.reshape(-1).astype(jnp.int32)
    return zeros.at[flat].add(vectors.astype(jnp.float32), mode="promise_in_bounds")
