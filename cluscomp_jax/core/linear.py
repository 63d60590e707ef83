"""linear(x, kernel): the one function that multiplies by dense and compressed kernels alike."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core.caller_mesh import partitioned, spec_of
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.sharded_kernel import ShardedKernel


def linear(x: jax.Array, kernel: Any, bias: jax.Array | None = None, *, out_dtype: Any = None) -> jax.Array:
    """Returns x @ kernel (+ bias) [..., d_out] in `out_dtype`.

    Args:
      x: [..., d_in]; its dtype is the compute dtype.
      kernel: an array [d_in, d_out], or a CodebookArray or ShardedKernel of that shape.
      bias: [d_out] or None.
      out_dtype: dtype of the result; None for that of x. float32 keeps the float32 sums of a dense
        16-bit product unrounded (the logits).
    """
    split = (*(spec_of(x, axis) for axis in range(x.ndim - 1)), _output_split(kernel))
    arguments = (x, kernel) if bias is None else (x, kernel, bias)
    return partitioned(partial(_linear, out_dtype=x.dtype if out_dtype is None else out_dtype), arguments, split)


def _output_split(kernel: Any) -> Any:
    """Returns the axes of an Explicit mesh that the kernel's outputs are split over; None where it cannot be split."""
    if isinstance(kernel, ShardedKernel):
        return None
    if not isinstance(kernel, CodebookArray):
        return spec_of(kernel, 1)
    cut = kernel.axis == "out"
    whole = cut and (kernel.matrix_shape[1] % kernel.group_size or not kernel.coding.splits_lines)
    return None if whole else spec_of(kernel.index, 1)


def _linear(x: jax.Array, kernel: Any, bias: jax.Array | None = None, *, out_dtype: Any) -> jax.Array:
    if isinstance(kernel, CodebookArray):
        codebook, index = jnp.asarray(kernel.codebook), jnp.asarray(kernel.index)
        y = kernel.coding.matmul(kernel.form, x, codebook, index).astype(out_dtype)
    elif isinstance(kernel, ShardedKernel):
        y = kernel.matmul(x).astype(out_dtype)
    else:
        y = jnp.matmul(x, jnp.asarray(kernel).astype(x.dtype), preferred_element_type=out_dtype)
    return y if bias is None else y + jnp.asarray(bias).astype(out_dtype)
