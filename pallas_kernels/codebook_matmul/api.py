"""The public op: y = x @ decode(codebook, index), with gradients for x and the codebook."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codebook_matmul.definition import Axis, codebook_gradient, decode


def codebook_matmul(
    x: jax.Array, codebook: jax.Array, index: jax.Array, *, shape: tuple[int, int], axis: Axis
) -> jax.Array:
    """Returns x @ W, shape [..., d_out], in the dtype of x, W decoded from codebook and index.

    Args:
      x: [..., d_in], floating.
      codebook: [n, g], floating; cast to the dtype of x before the product, as a dense kernel is.
      index: integer, [d_in, ceil(d_out/g)] for axis "out", [ceil(d_in/g), d_out] for axis "in".
      shape: (d_in, d_out).
      axis: the axis of W that the codes run along.

    Differentiable in x and codebook; the index has no gradient.

    Raises:
      ValueError: a shape that does not fit the others.
    """
    if x.shape[-1] != shape[0]:
        raise ValueError(f"codebook_matmul: x has {x.shape[-1]} channels, the matrix takes {shape[0]}")
    g = codebook.shape[1]
    pieces = (shape[0], -(-shape[1] // g)) if axis == "out" else (-(-shape[0] // g), shape[1])
    if index.shape != pieces:
        raise ValueError(
            f"codebook_matmul: index has shape {index.shape}, {shape} cut by {g} along {axis!r} needs {pieces}"
        )
    return _matmul(shape, axis, x, codebook, index)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(shape: tuple[int, int], axis: Axis, x: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
    weight = decode(codebook.astype(x.dtype), index, shape=shape, axis=axis)
    return x @ weight


def _forward(shape, axis, x, codebook, index):  # type: ignore[no-untyped-def]
    weight = decode(codebook.astype(x.dtype), index, shape=shape, axis=axis)
    return x @ weight, (x, codebook, index)


def _backward(shape, axis, saved, dy):  # type: ignore[no-untyped-def]
    x, codebook, index = saved
    weight = decode(codebook.astype(x.dtype), index, shape=shape, axis=axis)
    dx = (dy @ weight.T).astype(x.dtype)
    d_weight = jnp.matmul(x.reshape(-1, shape[0]).T, dy.reshape(-1, shape[1]), preferred_element_type=jnp.float32)
    d_codebook = codebook_gradient(d_weight, index, num_codes=codebook.shape[0], g=codebook.shape[1], axis=axis)
    return dx, d_codebook.astype(codebook.dtype), np.zeros(index.shape, jax.dtypes.float0)


_matmul.defvjp(_forward, _backward)
