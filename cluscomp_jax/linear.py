"""linear(x, kernel): the one place where dense and compressed kernels meet."""

from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.codebook import CodebookArray
from cluscomp_jax.sharded_kernel import ShardedKernel
from pallas_kernels.codebook_matmul import codebook_matmul


def linear(x: jax.Array, kernel: Any, bias: jax.Array | None = None, *, out_dtype: Any = None) -> jax.Array:
    """Returns x @ kernel (+ bias) [..., d_out] in `out_dtype`.

    Args:
      x: [..., d_in]; its dtype is the compute dtype.
      kernel: an array [d_in, d_out], or a CodebookArray or ShardedKernel of that shape.
      bias: [d_out] or None.
      out_dtype: dtype of the result; None for that of x. float32 keeps the float32 sums of a dense
        16-bit product unrounded (the logits).
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if isinstance(kernel, CodebookArray):
        y = codebook_matmul(
            x, jnp.asarray(kernel.codebook), jnp.asarray(kernel.index), shape=kernel.shape, axis=kernel.axis
        )
        y = y.astype(out_dtype)
    elif isinstance(kernel, ShardedKernel):
        y = kernel.matmul(x).astype(out_dtype)
    else:
        y = jnp.matmul(x, jnp.asarray(kernel).astype(x.dtype), preferred_element_type=out_dtype)
    return y if bias is None else y + jnp.asarray(bias).astype(out_dtype)
