"""CodebookArray: a weight matrix held as a codebook and an index. Knows nothing of its place in a model."""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.errors import InputError
from pallas_kernels.codebook_matmul import decode as _decode

Axis = Literal["out", "in"]
MAX_CODES = 65536
MAX_GROUP = 32


@partial(jax.tree_util.register_dataclass, data_fields=["codebook", "index"], meta_fields=["shape", "axis", "tied_to"])
@dataclasses.dataclass(frozen=True)
class CodebookArray:
    """A matrix W [d_in, d_out] of g-vectors drawn from n codes (paper section 3).

    Attributes:
      codebook: [n, g], floating; the part that trains.
      index: uint8 if n <= 256, else uint16; [d_in, ceil(d_out/g)] for axis "out", [ceil(d_in/g), d_out] for "in".
      shape: (d_in, d_out).
      axis: the axis that is cut: "out": W[i, j*g+t] = codebook[index[i, j], t];
        "in": W[j*g+t, o] = codebook[index[j, o], t].
      tied_to: path, within the block, of the kernel whose codebook this one is; it is stored once and trains as
        one. None: its own.

    Invariant: decode(w).shape == w.shape; index.max() < n. Padding is only past the end of the cut axis.
    """

    codebook: Any
    index: Any
    shape: tuple[int, int]
    axis: Axis = "out"
    tied_to: str | None = None

    @property
    def num_codes(self) -> int:
        """n, the codes of the codebook."""
        return int(self.codebook.shape[-2])

    @property
    def group_size(self) -> int:
        """g, the weights per code."""
        return int(self.codebook.shape[-1])

    @property
    def dtype(self) -> Any:
        """The codebook's dtype, which is that of the decoded matrix."""
        return self.codebook.dtype

    def owner(self, path: str) -> str:
        """Returns the path of the kernel whose codebook this one is, `path` being its own."""
        return self.tied_to or path


def index_dtype(num_codes: int) -> Any:
    """Returns the dtype of an index into `num_codes` codes: uint8 up to 256, else uint16."""
    return jnp.uint8 if num_codes <= 256 else jnp.uint16


def index_bits(num_codes: int) -> int:
    """Returns the bits one index entry takes in storage: ceil(log2 n)."""
    return max(num_codes - 1, 0).bit_length()


def index_shape(shape: tuple[int, int], g: int, axis: Axis) -> tuple[int, int]:
    """Returns the shape of the index of a [d_in, d_out] matrix cut into g-vectors along `axis`."""
    d_in, d_out = shape
    return (d_in, -(-d_out // g)) if axis == "out" else (-(-d_in // g), d_out)


def stored_bits(
    shape: tuple[int, int], *, g: int, num_codes: int, axis: Axis, own: bool = True, codebook_bits: int = 16
) -> int:
    """Returns the bits a matrix takes in storage: the index (its last byte not rounded up) and a codebook of its own.

    Args:
      shape: (d_in, d_out).
      g: weights per code.
      num_codes: of the codebook.
      axis: the axis that is cut.
      own: False where another kernel stores the codebook.
      codebook_bits: of one number of the codebook.
    """
    codes = codebook_bits * g * num_codes if own else 0
    return index_bits(num_codes) * math.prod(index_shape(shape, g, axis)) + codes


def round_codebook(codebook: jax.Array, dtype: Any) -> jax.Array:
    """Returns the codebook in the 16-bit `dtype`, or in bfloat16 where that keeps it better: beyond the range of
    float16, and where codes are so small that float16 rounds them more coarsely, or to 0.
    """
    rounded = codebook.astype(dtype)
    return rounded if bool(keeps_codes(codebook, rounded).all()) else codebook.astype(jnp.bfloat16)


def keeps_codes(exact: jax.Array, rounded: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
    """Returns whether `rounded` loses no more of the numbers than bfloat16 does, by squared error; bool, axes kept.

    Args:
      exact: any floating dtype.
      rounded: of the same shape.
      axis: the axes of one codebook; None: all.
    """
    exact = exact.astype(jnp.float32)
    # In units of the largest number: the squares of small ones would be 0 themselves.
    unit = jnp.max(jnp.abs(exact), axis=axis, keepdims=True)
    unit = jnp.where(unit > 0, unit, 1.0)

    def lost(kept: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square((kept.astype(jnp.float32) - exact) / unit), axis=axis, keepdims=True)

    return lost(rounded) <= lost(exact.astype(jnp.bfloat16))


def decode(w: CodebookArray) -> jax.Array:
    """Returns the matrix [d_in, d_out] in the codebook's dtype."""
    matrix: jax.Array = decode_arrays(jnp.asarray(w.codebook), jnp.asarray(w.index), shape=w.shape, axis=w.axis)
    return matrix


decode_arrays = partial(jax.jit, static_argnames=("shape", "axis"), inline=True)(_decode)
"""`decode` of a codebook and an index, as one program."""


def validate(w: CodebookArray, where: str = "CodebookArray") -> CodebookArray:
    """Returns w if its parts fit each other.

    Raises:
      InputError: sizes, dtypes or index values break the class invariant; `where` names the matrix.
    """
    if w.axis not in ("out", "in"):
        raise InputError(f"{where}: axis is {w.axis!r}; it must be 'out' or 'in'")
    if len(w.codebook.shape) != 2:
        raise InputError(f"{where}: codebook has shape {tuple(w.codebook.shape)}; it must be [codes, group]")
    n, g = w.codebook.shape
    if not 1 <= n <= MAX_CODES or not 1 <= g <= MAX_GROUP:
        raise InputError(f"{where}: codebook is [{n}, {g}]; codes must be 1 to {MAX_CODES}, group 1 to {MAX_GROUP}")
    expected = index_shape(w.shape, g, w.axis)
    if tuple(w.index.shape) != expected:
        raise InputError(
            f"{where}: index has shape {tuple(w.index.shape)}; "
            f"{w.shape} in groups of {g} along {w.axis!r} needs {expected}"
        )
    if np.dtype(w.index.dtype) != np.dtype(index_dtype(n)):
        raise InputError(f"{where}: index is {w.index.dtype}; {n} codes need {np.dtype(index_dtype(n))}")
    highest = int(np.max(np.asarray(w.index)))
    if highest >= n:
        raise InputError(f"{where}: index names code {highest}, the codebook has {n}")
    return w
