"""Where the arrays and rows of a run lie on a mesh of devices. XLA does the rest. Knows no loss and no loop.

Rows of a batch are spread over "data" and "fsdp". Matrices, their indices and their codebooks are split over "fsdp"
and "tensor"; what "fsdp" parts is gathered block by block, where it is used. A dimension that an axis does not divide
stays whole along it.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.sharded_kernel import ShardedKernel, Side, spec
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model

FSDP, TENSOR = "fsdp", "tensor"
AXES = ("data", FSDP, TENSOR)
ROWS = AXES[:2]
OUTER = "rest"
"""The group of the parameters outside the blocks, in the trees of training."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh, and which kernels of a model are split along their inputs; hashable.

    Attributes:
      mesh: with the axes "data", "fsdp" and "tensor".
      row_parallel: block-relative paths of the kernels whose "tensor" parts each take a part of the input; all others
        each give a part of the output.
    """

    mesh: Mesh
    row_parallel: frozenset[str]

    @property
    def row_parts(self) -> int:
        """How many parts the rows of a batch come in."""
        return int(np.prod([self.mesh.shape[axis] for axis in ROWS]))

    @property
    def everywhere(self) -> NamedSharding:
        """The place of what is whole on every device."""
        return self._on()

    def rows(self, ndim: int) -> NamedSharding:
        """Returns the place of rows [..., b, t], of which b is spread over the devices."""
        return self._on(*(None,) * (ndim - 2), ROWS)

    def of(self, name: str, leaf: Any) -> Any:
        """Returns the sharding of a leaf of the trained or frozen tree: a NamedSharding, or a CodebookArray of them.

        Args:
          name: its group and path, followed by "/codebook" where it is one.
          leaf: has a shape; stacked, unless its group is "rest".
        """
        group, _, path = name.partition("/")

        def place(array: Any, codebook: bool) -> NamedSharding:
            shape = tuple(array.shape if group == OUTER else array.shape[1:])
            axes = self._codes(shape) if codebook else self._sides(path, shape)
            return self._on(*axes) if group == OUTER else self._on(None, *axes)

        if isinstance(leaf, CodebookArray):
            codebook = None if leaf.codebook is None else place(leaf.codebook, True)
            return dataclasses.replace(leaf, codebook=codebook, index=place(leaf.index, False))
        return place(leaf, path.endswith("/codebook"))

    def put(self, name: str, leaf: Any) -> Any:
        """Returns a leaf of host arrays where `of` says; every process takes the parts of its own devices."""
        return jax.tree.map(_put, leaf, self.of(name, leaf))

    def put_rows(self, rows: np.ndarray) -> jax.Array:
        """Returns [..., b, t] of the host, the same in every process, with b spread over the devices."""
        return _put(rows, self.rows(rows.ndim))

    def splits(self, rows: int) -> bool:
        """Returns whether this many rows can be spread equally."""
        return rows % self.row_parts == 0

    def samples(self, count: int) -> NamedSharding:
        """Returns the place of [b, ...] with b spread over the devices; whole on each where it cannot be equally."""
        return self._on(ROWS) if self.splits(count) else self.everywhere

    def by_rows(self, x: jax.Array) -> jax.Array:
        """Returns x [b, ...] with b spread over the devices and nothing else."""
        return hold(x, self._on(ROWS))

    def used(self, path: str, leaf: Any) -> Any:
        """Returns a leaf of a block, or of what is outside all, as it is used: whole but for "tensor".

        An index whose codebook is elsewhere keeps its sharding; an array already in the form of its use is unchanged.
        """
        if isinstance(leaf, CodebookArray):
            whole = leaf.codebook is not None
            return ShardedKernel(leaf, self.mesh, ROWS, TENSOR, self._split(path, leaf)) if whole else leaf
        if isinstance(leaf, ShardedKernel):
            return leaf
        return hold(leaf, self._on(*(axis if axis == TENSOR else None for axis in self._sides(path, leaf.shape))))

    def _on(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        return NamedSharding(self.mesh, spec(*axes))

    def _divides(self, axis: str, size: int) -> bool:
        return size % int(self.mesh.shape[axis]) == 0

    def _codes(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Returns the axes of a codebook [n, g]."""
        parts = self.mesh.shape[FSDP] * self.mesh.shape[TENSOR]
        both = (FSDP, TENSOR) if shape[0] % parts == 0 else None
        return both or (FSDP if self._divides(FSDP, shape[0]) else None), None

    def _sides(self, path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Returns the axes of a matrix or an index of one; other arrays are small, and whole everywhere."""
        if len(shape) != 2:
            return ()
        # The rows of an embedding are logits where it is the head too, so they are what "tensor" parts.
        axes = (FSDP, TENSOR) if path.endswith("/kernel") and path not in self.row_parallel else (TENSOR, FSDP)
        return tuple(axis if self._divides(axis, size) else None for axis, size in zip(axes, shape, strict=True))

    def _split(self, path: str, w: CodebookArray) -> Side | None:
        """Returns the side along which the product by w is split, None where its parts would not be equal."""
        side: Side = "in" if path in self.row_parallel else "out"
        place = 0 if side == "in" else 1
        pieces, size = w.index.shape[place], w.matrix_shape[place]
        whole = w.axis == side and (size % w.group_size != 0 or not w.coding.splits_lines)
        return None if whole or not self._divides(TENSOR, pieces) else side


def make_sharding(settings: MeshConfig, model: Model) -> Sharding | None:
    """Returns the Sharding of `model` on all devices of all processes; None for one process on one device.

    Raises:
      InputError: the mesh takes another number of devices than there are, or what `sharding_on` refuses.
    """
    devices, processes = jax.device_count(), jax.process_count()
    if settings.size == 1 and processes == 1:
        return None
    if settings.size != devices:
        raise InputError(
            f"mesh {settings} takes {settings.size} devices, there are {devices} in {processes} process(es); choose "
            f"sizes whose product is {devices}"
        )
    mesh = jax.make_mesh(settings.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return sharding_on(mesh, model)


def sharding_on(mesh: Mesh, model: Model) -> Sharding:
    """Returns the Sharding of `model` on a mesh with the AXES.

    Raises:
      InputError: the model has experts.
    """
    if any("/experts/" in path for path in model.block_shapes(0)):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise InputError(f"mesh {sizes}: a mixture of experts runs on one device; take sizes of 1")
    return Sharding(mesh, model.row_parallel)


def put_samples(x: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """Returns [b, ...] of the host on the devices that share its samples, or on the only one."""
    there: jax.Array = jax.device_put(x, None if sharding is None else sharding.samples(len(x)))
    return there


def put_whole(tree: Params, sharding: Sharding | None) -> Params:
    """Returns the parameters whole on every device."""
    there: Params = jax.device_put(tree, None if sharding is None else sharding.everywhere)
    return there


def gathered(params: Params, sharding: Sharding | None) -> Params:
    """Returns the parameters with every leaf as it is used."""
    return params if sharding is None else trees.map_by_path(sharding.used, params)


def hold(array: Any, place: NamedSharding) -> jax.Array:
    """Returns the array, constrained to the sharding `place` where a program is partitioned over devices."""
    held: jax.Array = jax.lax.with_sharding_constraint(array, place)  # type: ignore[no-untyped-call]
    return held


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda part: np.asarray(array[part]))
