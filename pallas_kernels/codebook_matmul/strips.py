"""The gradient of a codebook on a GPU in a fixed order of additions, strip by strip of the matrix.

A strip of the dense gradient is one matrix product. Its vectors are sorted by code, which is a stable radix sort of 8
or 16-bit keys, and summed by code in that order. The dense gradient of the whole matrix never exists, and nothing is
kept between calls: sorted positions of all matrices would take twice the memory of the indices themselves.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_matmul.definition import Axis, codes_of

STRIP_BYTES = 2**26
"""The largest strip of a dense float32 gradient; changes speed and memory, and the order of additions."""

SegmentSum = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def sorted_by_code(
    codes: jax.Array, num_codes: int, *, method: Literal["scan", "scan_unrolled"] = "scan"
) -> tuple[jax.Array, jax.Array]:
    """Returns (order int32 [p], starts int32 [n+1]) as a `SegmentSum` takes them, of equal codes the first place first.

    Args:
      codes: integer [p], below n.
      num_codes: n.
      method: of `jnp.searchsorted`; unrolled it has fewer launches and a larger program.
    """
    codes, order = jax.lax.sort((codes, jnp.arange(codes.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    ends = jnp.arange(num_codes + 1, dtype=jnp.int32)
    return order, jnp.searchsorted(codes.astype(jnp.int32), ends, method=method).astype(jnp.int32)


def ordered_gradient(
    x: jax.Array,
    dy: jax.Array,
    index: jax.Array,
    segment_sum: SegmentSum,
    *,
    num_codes: int,
    g: int,
    axis: Axis,
    step_bits: int | None = None,
) -> jax.Array:
    """Returns the gradient [n, g], float32, of the codebook of W in y = x @ W.

    Args:
      x: [m, d_in].
      dy: [m, d_out], of the dtype of x.
      index: as in `decode`.
      segment_sum: (vectors float32 [p, g], order int32 [p], starts int32 [n+1]) -> sums [n, g] of each code's vectors
        in that order.
    """
    rows_of, weights_of = (x, dy) if axis == "out" else (dy, x)
    index = index if axis == "out" else index.T
    rows, groups = len(index), -(-weights_of.shape[1] // g)
    weights_of = jnp.pad(weights_of, ((0, 0), (0, groups * g - weights_of.shape[1])))
    strip = max(1, min(rows, STRIP_BYTES // (4 * groups * g)))

    def strip_gradient(start: jax.Array | int, size: int) -> jax.Array:
        codes = jax.lax.dynamic_slice_in_dim(index, start, size)
        strip_shape = (size, weights_of.shape[1])
        codes = codes_of(codes, shape=strip_shape, num_codes=num_codes, g=g, axis="out", step_bits=step_bits).reshape(
            -1
        )
        part = jax.lax.dynamic_slice_in_dim(rows_of, start, size, axis=1)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        dense = jnp.matmul(part.T, weights_of, preferred_element_type=jnp.float32, precision=precision)
        return segment_sum(dense.reshape(-1, g), *sorted_by_code(codes, num_codes))

    whole = rows // strip
    total: jax.Array = jax.lax.fori_loop(
        0,
        whole,
        lambda i, total: total + strip_gradient(i * strip, strip),
        jnp.zeros((num_codes, g), jnp.float32),
    )
    rest = rows - whole * strip
    return total + strip_gradient(whole * strip, rest) if rest else total
