"""Sums over positions of x x^T and x e^T, the products that Hessians and drift corrections are made of.

Rows of 16 bit, which activations have on a GPU, are multiplied as they are, with float32 sums: a product of two such
numbers is exact in float32. A symmetric sum is then computed on and above its diagonal only. All other rows are
multiplied in float32.

Letters: m positions, i channels of x, j channels of e.
"""

import jax
import jax.numpy as jnp

MATRIX_UNITS = "tensorfloat32"
"""The precision of products of a moment, or its root, with many columns. On a GPU they are TensorFloat-32: operands of
11 bits, sums of float32. On a CPU they are float32, as with "highest"."""
_PARTS = 8
"""Most blocks of rows of a symmetric matrix: 9/16 of it is computed."""
_MULTIPLE = 128
"""Rows of a block are a multiple of this, a tile of matrix units."""


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the product float32 [..., j], of operands of 16 bit where `left` is, else of float32.

    Args:
      left: [..., i].
      right: [i, j]; rounded to the dtype of `left` where that has 16 bit.
    """
    if _has_16_bit(left):
        return jnp.dot(left, right.astype(left.dtype), preferred_element_type=jnp.float32)
    return jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32), precision="highest")


def cross_moment(x: jax.Array, e: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Returns the sum of w x e^T over positions, float32 [i, j].

    Args:
      x: [m, i]; where it has 16 bit, e is rounded to its dtype.
      e: float32 [m, j].
      weights: w float32, m numbers >= 0; None: 1. Where x has 16 bit, x and e are each scaled by the root. That leaves
        a position of weight 1 as it is.
    """
    if weights is None:
        return dot(x.T, e)
    if _has_16_bit(x):
        return dot(_scaled(x, weights).astype(x.dtype).T, _scaled(e, weights))
    return dot((x.astype(jnp.float32) * weights.reshape(-1, 1)).T, e)


def second_moment(x: jax.Array, weights: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Returns the sum of w x x^T over positions, as blocks of its rows for `symmetric`, float32.

    Where x has 16 bit, a block has the columns from its own first row on. Else the sum is one block.

    Args:
      x: [m, i].
      weights: as `cross_moment` takes them.
    """
    if not _has_16_bit(x):
        return (cross_moment(x, x.astype(jnp.float32), weights),)
    x = x if weights is None else _scaled(x, weights).astype(x.dtype)
    return tuple(dot(x[:, begin:end].T, x[:, begin:]) for begin, end in row_blocks(x.shape[1]))


def row_blocks(i: int) -> list[tuple[int, int]]:
    """Returns (first row, row after the last) of each block of a symmetric matrix of i rows."""
    rows = -(-i // (_PARTS * _MULTIPLE)) * _MULTIPLE
    return [(begin, min(begin + rows, i)) for begin in range(0, i, rows)]


def symmetric(blocks: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the matrix float32 [i, i] of the blocks of `second_moment`; of several, it is its own transpose."""
    if len(blocks) == 1:
        return blocks[0]
    i = blocks[0].shape[1]
    upper = jnp.concatenate([jnp.pad(block, ((0, 0), (i - block.shape[1], 0))) for block in blocks])
    at = jnp.arange(i)
    return jnp.where(at[:, None] <= at, upper, upper.T)


def _has_16_bit(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating)) and x.dtype.itemsize == 2


def _scaled(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns x times the roots of the weights, float32."""
    return x.astype(jnp.float32) * jnp.sqrt(weights).reshape(-1, 1)
