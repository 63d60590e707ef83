"""CodebookArray: a weight matrix held as a codebook and an index. Knows nothing of its place in a model."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import flax_state
from cluscomp_jax.core.caller_mesh import explicit_mesh, partitioned, spec_of
from cluscomp_jax.core.coding import PLAIN, Axis, Coding, Form
from cluscomp_jax.core.host_axes import HostAxes, with_stack
from cluscomp_jax.core.host_splits import Splits
from cluscomp_jax.errors import InputError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codebook", "index"],
    meta_fields=["matrix_shape", "axis", "tied_to", "host", "coding"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CodebookArray:
    """A matrix W [d_in, d_out] of g-vectors drawn from n codes (paper section 3), or a stack of such matrices.

    What is static describes one matrix. Stacked matrices have stacked leaves: how many there are is read off the rank
    of the leaves, so that indexing, `lax.scan` and `vmap` give the matrices one by one; the axis they run over must be
    that at which the stacked axes begin.

    It can take the place of an array: `shape`, `dtype` and indexing are those of the host's array, and functions of JAX
    that convert their arguments decode it first. `linear` and `with_codebooks` multiply without decoding. Equality and
    hash are those of the object; it has no arithmetic of its own.

    Attributes:
      codebook: [*stack, n, g], floating; the part that trains.
      index: integers, two axes as the coding has them. Plain: uint8 if n <= 256, else uint16; [*stack, d_in,
        ceil(d_out/g)] for axis "out", [*stack, ceil(d_in/g), d_out] for "in". The stacked axes begin at
        `host.stack_at`, in front without a host, in codebook and index.
      matrix_shape: (d_in, d_out).
      axis: the axis that is cut: "out": W[i, j*g+t] = codebook[code[i, j], t];
        "in": W[j*g+t, o] = codebook[code[j, o], t].
      tied_to: path, within the block, of the kernel whose codebook this one is; it is stored once and trains as
        one. None: its own.
      host: the axes and the dtype that the host has for a matrix; None: [d_in, d_out] in the codebook's dtype.
      coding: how the index names the codes (`core.coding`); plain: by their numbers.

    Invariant: decode(w).shape == w.shape; every code is < n. Padding is only past the end of the cut axis.
    """

    codebook: Any
    index: Any
    matrix_shape: tuple[int, int]
    axis: Axis = "out"
    tied_to: str | None = None
    host: HostAxes | None = None
    coding: Coding = PLAIN

    def __post_init__(self) -> None:
        flax_state.register(CodebookArray)

    @property
    def num_codes(self) -> int:
        """n, the codes of a codebook."""
        return int(self._front(self.codebook.shape)[-2])

    @property
    def group_size(self) -> int:
        """g, the weights per code."""
        return int(self._front(self.codebook.shape)[-1])

    @property
    def form(self) -> Form:
        """What is static of one matrix and its codebook."""
        return Form(self.matrix_shape, self.num_codes, self.group_size, self.axis)

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stacked axes; () for one matrix."""
        shape = self.index.shape if self.codebook is None else self.codebook.shape
        return tuple(self._front(shape)[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the host's array: that of one matrix with the stacked axes put in."""
        if self.host is None:
            return (*self.stack, *self.matrix_shape)
        return with_stack(self.host.shape, self.stack, self.host.stack_at)

    @property
    def dtype(self) -> Any:
        """The dtype of the decoded array: the host's, else the codebook's."""
        if self.host is not None and self.host.dtype is not None:
            return jnp.dtype(self.host.dtype)
        return self.codebook.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the host's array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes in memory of codebook and index."""
        return int(self.codebook.nbytes) + int(self.index.nbytes)

    @property
    def T(self) -> jax.Array:
        """The decoded array with its axes reversed."""
        return decode(self).T

    def astype(self, dtype: Any) -> jax.Array:
        """Returns the decoded array in `dtype`."""
        return decode(self).astype(dtype)

    def owner(self, path: str) -> str:
        """Returns the path of the kernel whose codebook this one is, `path` being its own."""
        return self.tied_to or path

    def stacked_in_front(self) -> "CodebookArray":
        """Returns the array with the stacked axes of codebook and index in front."""
        at = 0 if self.host is None else self.host.stack_at
        if at == 0 or not self.stack:
            return self
        host, axes = dataclasses.replace(self.host, stack_at=0), range(at, at + len(self.stack))  # type: ignore[type-var]
        front = [jnp.moveaxis(leaf, axes, range(len(axes))) for leaf in (self.codebook, self.index)]
        return dataclasses.replace(self, codebook=front[0], index=front[1], host=host)

    def _front(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the sizes of a leaf, those of the stacked axes in front."""
        at = 0 if self.host is None else self.host.stack_at
        end = at + len(shape) - 2
        return (*shape[at:end], *shape[:at], *shape[end:])

    def __getitem__(self, key: Any) -> Any:
        """Returns the array itself at [...], matrices at an index of a stacked first axis, else decoded numbers."""
        if key is Ellipsis:
            return self
        if self.stack and (self.host is None or self.host.stack_at == 0) and not isinstance(key, tuple):
            if isinstance(key, int) and not -self.stack[0] <= key < self.stack[0]:
                raise IndexError(f"index {key} is out of bounds for {self.stack[0]} stacked matrices")
            return dataclasses.replace(self, codebook=self.codebook[key], index=self.index[key])
        return decode(self)[key]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __jax_array__(self) -> jax.Array:
        return decode(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(decode(self), dtype)

    def __repr__(self) -> str:
        leaves = (self.codebook, self.index)
        if not all(hasattr(leaf, "shape") for leaf in leaves):  # parted, or a tree of something else
            parts = (f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else str(leaf) for leaf in leaves)
            return f"CodebookArray({', '.join(parts)})"
        n, g = self.num_codes, self.group_size
        coding = "" if self.coding == PLAIN else f", {self.coding}"
        return f"CodebookArray({self.dtype}{list(self.shape)}, {n} codes of {g}, axis={self.axis!r}{coding})"


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
    """Returns the decoded array, in the host's shape and dtype.

    Without a host it is [*stack, d_in, d_out] in the codebook's dtype. On a mesh with Explicit axes its type has the
    splits of the index (`decoded_split`).
    """
    return partitioned(_decode_host, (w,), decoded_split(w))


def decoded_split(w: CodebookArray) -> tuple[Any, ...]:
    """Returns what each axis of the decoded array is split over by its type, on a mesh with Explicit axes.

    That of the index, as far as every device has the same number of whole vectors; None for other axes and meshes.
    """
    mesh = explicit_mesh(w)
    if mesh is None:
        return (None,) * w.ndim
    return splits(w, mesh.shape).of_host([spec_of(w.index, axis) for axis in range(w.index.ndim)])


def splits(w: CodebookArray, mesh: Mapping[str, int]) -> Splits:
    """Returns how the axes of the host's array and those of the index are split over a mesh {axis: size}."""
    pieces, _ = w.coding.index_spec(w.form)
    cut = ("in", "out").index(w.axis)
    last = bool(w.matrix_shape[cut] % w.group_size) or not w.coding.splits_lines
    padded = (last and cut == 0, last and cut == 1)
    host = w.host or HostAxes(w.matrix_shape, (0, 1), 1)
    return Splits(host, len(w.stack), pieces, padded, mesh)


def _decode_host(w: CodebookArray) -> jax.Array:
    if not w.stack:
        matrix: jax.Array = decode_arrays(jnp.asarray(w.codebook), jnp.asarray(w.index), form=w.form, coding=w.coding)
        return matrix if w.host is None else w.host.from_matrix(matrix)
    at = 0 if w.host is None else w.host.stack_at
    decoded: jax.Array = jax.vmap(_decode_host, in_axes=at, out_axes=at)(w)
    return decoded


@partial(jax.jit, static_argnames=("form", "coding"), inline=True)
def decode_arrays(codebook: jax.Array, index: jax.Array, *, form: Form, coding: Coding) -> jax.Array:
    """Returns `decode` of a codebook and an index, as one program."""
    return coding.decode(form, codebook, index)


@partial(jax.jit, static_argnames=("form", "coding"))
def index_arrays(codes: jax.Array, *, form: Form, coding: Coding) -> jax.Array:
    """Returns the index of the codes of all vectors, as one program."""
    return coding.index_of(form, codes)


def validate(w: CodebookArray, where: str = "CodebookArray") -> CodebookArray:
    """Returns w if its parts fit each other.

    Raises:
      InputError: sizes, dtypes or index values break the class invariant; `where` names the matrix.
    """
    if w.axis not in ("out", "in"):
        raise InputError(f"{where}: axis is {w.axis!r}; it must be 'out' or 'in'")
    if len(w.codebook.shape) < 2:
        raise InputError(f"{where}: codebook has shape {tuple(w.codebook.shape)}; it must be [codes, group]")
    n, g = w.num_codes, w.group_size
    w.coding.check(w.form, where)
    at = 0 if w.host is None else w.host.stack_at
    one, dtype = w.coding.index_spec(w.form)
    expected = with_stack(one, w.stack, at)
    if tuple(w.index.shape) != expected:
        raise InputError(
            f"{where}: index has shape {tuple(w.index.shape)}; "
            f"{w.matrix_shape} in groups of {g} along {w.axis!r} needs {expected}"
        )
    if w.host is not None and w.host.matrix_shape != tuple(w.matrix_shape):
        raise InputError(f"{where}: the host's axes make {w.host.matrix_shape}, the matrix is {w.matrix_shape}")
    if np.dtype(w.index.dtype) != dtype:
        raise InputError(f"{where}: index is {w.index.dtype}; {n} codes need {dtype}")
    w.coding.check_index(w.form, stack_in_front(w.index, w), where)
    return w


def stack_in_front(part: Any, w: CodebookArray) -> np.ndarray[Any, Any]:
    """Returns the codebook or the index of `w` as an array of the host, its stacked axes in front."""
    front = range(len(w.stack))
    at = 0 if w.host is None else w.host.stack_at
    return np.moveaxis(np.asarray(part), [at + k for k in front], front)
