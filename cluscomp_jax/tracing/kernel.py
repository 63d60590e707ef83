"""TracedKernel: a kernel inside the program of a host, seen through the host's reshapes and transposes.

The program moves the axes of an array; the matrices [d_in, d_out] stay as they are, and which of their axes the program
has where is written down. An axis is a tuple of atoms. An atom is a part of a side of the matrix, or a stacked axis.
Knows no jaxpr.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.core.caller_mesh import partitioned
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.host_axes import HostAxes
from cluscomp_jax.core.linear import linear


class Atom(NamedTuple):
    """A part of one side of the matrices, or a stacked axis.

    Attributes:
      side: "stack", "in" or "out".
      place: its place among the atoms of its side, which are in the order of their places.
      size: of the axis.
    """

    side: Literal["stack", "in", "out"]
    place: tuple[int, ...]
    size: int


Dims = tuple[tuple[Atom, ...], ...]


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class NamedMatrix:
    """Dense matrices of a kernel whose products are observed.

    Attributes:
      array: [*stack, d_in, d_out].
      name: path of the kernel.
    """

    array: Any
    name: str


@partial(jax.tree_util.register_dataclass, data_fields=["payload"], meta_fields=["dims", "dtype"])
@dataclasses.dataclass(frozen=True)
class TracedKernel:
    """A kernel as the program has it at one place.

    Attributes:
      payload: the matrices: a CodebookArray without a host, or a NamedMatrix; stacked axes in front.
      dims: the atoms of each axis that the program sees. Atoms of size 1 of the matrices' sides may be missing.
      dtype: name of the dtype that the program sees, which the payload has.
    """

    payload: CodebookArray | NamedMatrix
    dims: Dims
    dtype: str

    @classmethod
    def of(cls, w: CodebookArray) -> "TracedKernel":
        """Returns the kernel of a CodebookArray, its axes those of its host."""
        stack, host, dtype = w.stack, w.host, jnp.dtype(w.dtype).name
        front = dataclasses.replace(w.stacked_in_front(), host=None)
        return cls(_cast(front, dtype), _dims(host or _plain(w.matrix_shape), stack), dtype)

    @classmethod
    def of_matrix(cls, array: Any, host: HostAxes, name: str) -> "TracedKernel":
        """Returns the kernel of a dense array with the host's axes."""
        stack = array.shape[host.stack_at : host.stack_at + array.ndim - len(host.shape)]
        return cls(NamedMatrix(host.to_stack(array), name), _dims(host, stack), jnp.dtype(array.dtype).name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the program sees."""
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def stack(self) -> tuple[Atom, ...]:
        """The stacked atoms, in the order of the payload's axes."""
        return tuple(sorted((a for dim in self.dims for a in dim if a.side == "stack"), key=lambda a: a.place))

    def dense(self, split: tuple[Any, ...] | None = None) -> jax.Array:
        """Returns the array that the program sees.

        Args:
          split: what its axes are split over on a mesh with Explicit axes; None: over nothing.
        """
        return partitioned(TracedKernel._dense, (self,), split or (None,) * len(self.dims))

    def _dense(self) -> jax.Array:
        payload = self.payload
        matrices = decode(payload) if isinstance(payload, CodebookArray) else jnp.asarray(payload.array)
        atoms = [atom for dim in self.dims for atom in dim]
        canonical = sorted(atoms, key=_canonical)
        array = matrices.reshape([atom.size for atom in canonical])
        return array.transpose([canonical.index(atom) for atom in atoms]).reshape(self.shape).astype(self.dtype)

    def product(self, x: jax.Array, out_dtype: Any) -> jax.Array:
        """Returns x @ W [..., d_out] of x [..., d_in]; of one matrix."""
        kernel = self.payload
        if isinstance(kernel, NamedMatrix):
            return linear(x, jnp.asarray(kernel.array), out_dtype=out_dtype)
        # Else XLA decodes all kernels of a program before its first product on a CPU, and holds them together.
        x, index = jax.lax.optimization_barrier((x, jnp.asarray(kernel.index)))  # type: ignore[no-untyped-call]
        return linear(x, dataclasses.replace(kernel, index=index), out_dtype=out_dtype)

    def cast(self, dtype: Any) -> "TracedKernel | None":
        """Returns the kernel in another floating dtype, None for others."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return dataclasses.replace(self, payload=_cast(self.payload, dtype), dtype=jnp.dtype(dtype).name)

    def transpose(self, permutation: tuple[int, ...]) -> "TracedKernel":
        """Returns the kernel with its axes permuted."""
        return dataclasses.replace(self, dims=tuple(self.dims[axis] for axis in permutation))

    def reshape(self, sizes: tuple[int, ...]) -> "TracedKernel | None":
        """Returns the kernel reshaped, None where a stacked axis would be cut."""
        kernel = self._without_single_stacks()
        atoms = [atom for dim in kernel.dims for atom in dim if atom.size > 1]
        dims: list[tuple[Atom, ...]] = []
        for size in sizes:
            dim: list[Atom] = []
            while size > 1:
                atom = atoms.pop(0)
                if size % atom.size:
                    if atom.side == "stack" or atom.size % size:
                        return None
                    first = Atom(atom.side, (*atom.place, 0), size)
                    atoms.insert(0, Atom(atom.side, (*atom.place, 1), atom.size // size))
                    atom = first
                dim.append(atom)
                size //= atom.size
            dims.append(tuple(dim))
        return dataclasses.replace(kernel, dims=tuple(dims))

    def squeeze(self, axes: tuple[int, ...]) -> "TracedKernel":
        """Returns the kernel without these axes of size 1."""
        kernel = self
        for axis in axes:
            for atom in self.dims[axis]:
                if atom.side == "stack":
                    kernel = kernel._at(atom, 0)
        axes = tuple(axis % len(self.dims) for axis in axes)
        dims = tuple(dim for axis, dim in enumerate(kernel.dims) if axis not in axes)
        return dataclasses.replace(kernel, dims=dims)

    def broadcast(self, shape: tuple[int, ...], where: tuple[int, ...]) -> "TracedKernel | None":
        """Returns the kernel with new axes of size 1, None where numbers would be repeated."""
        if tuple(shape[axis] for axis in where) != self.shape or math.prod(shape) != math.prod(self.shape):
            return None
        dims = [self.dims[where.index(axis)] if axis in where else () for axis in range(len(shape))]
        return dataclasses.replace(self, dims=tuple(dims))

    def sliced(self, axis: int, start: Any, size: int, stride: int = 1) -> "TracedKernel | None":
        """Returns some of the matrices along a stacked axis, None where another axis is cut."""
        if len(self.dims[axis]) != 1 or self.dims[axis][0].side != "stack":
            return None
        atom = self.dims[axis][0]
        k = self.stack.index(atom)

        def cut(leaf: Any) -> Any:
            if isinstance(start, int):
                return jax.lax.slice_in_dim(leaf, start, start + (size - 1) * stride + 1, stride, k)
            return jax.lax.dynamic_slice_in_dim(leaf, start, size, k)

        dims = list(self.dims)
        dims[axis] = (atom._replace(size=size),)
        return TracedKernel(jax.tree.map(cut, self.payload), tuple(dims), self.dtype)

    def leading(self) -> "TracedKernel | None":
        """Returns the kernel of one matrix of the first axis, its payload still stacked along it in front.

        None where the first axis is not one stacked axis. `lax.scan` slices the payload.
        """
        if not self.dims or len(self.dims[0]) != 1 or self.dims[0][0].side != "stack":
            return None
        k = self.stack.index(self.dims[0][0])
        payload = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, k, 0), self.payload)
        return TracedKernel(payload, self.dims[1:], self.dtype)

    def unstacked(self, atom: Atom) -> "TracedKernel":
        """As `leading`, of any stacked atom, which is taken out of its axis."""
        k = self.stack.index(atom)
        payload = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, k, 0), self.payload)
        return TracedKernel(payload, _less(self.dims, atom), self.dtype)

    def _at(self, atom: Atom, i: int) -> "TracedKernel":
        k = self.stack.index(atom)
        payload = jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, i, k, keepdims=False), self.payload)
        return TracedKernel(payload, _less(self.dims, atom), self.dtype)

    def _without_single_stacks(self) -> "TracedKernel":
        kernel = self
        for atom in self.stack:
            if atom.size == 1:
                kernel = kernel._at(atom, 0)
        return kernel


def _cast(payload: CodebookArray | NamedMatrix, dtype: Any) -> CodebookArray | NamedMatrix:
    """Returns the matrices rounded to `dtype`, as the program's array is."""
    if isinstance(payload, CodebookArray):
        return dataclasses.replace(payload, codebook=jnp.asarray(payload.codebook).astype(dtype))
    return dataclasses.replace(payload, array=jnp.asarray(payload.array).astype(dtype))


def _plain(matrix_shape: tuple[int, int]) -> HostAxes:
    return HostAxes(tuple(matrix_shape), (0, 1), 1)


def _dims(host: HostAxes, stack: tuple[int, ...]) -> Dims:
    places = {axis: place for place, axis in enumerate(host.order)}
    sides = [
        (Atom("in" if places[axis] < host.num_in else "out", (places[axis],), size),)
        for axis, size in enumerate(host.shape)
    ]
    stacked = [(Atom("stack", (k,), size),) for k, size in enumerate(stack)]
    return (*sides[: host.stack_at], *stacked, *sides[host.stack_at :])


def _canonical(atom: Atom) -> tuple[int, tuple[int, ...]]:
    return ("stack", "in", "out").index(atom.side), atom.place


def _less(dims: Dims, atom: Atom) -> Dims:
    return tuple(tuple(other for other in dim if other != atom) for dim in dims)
