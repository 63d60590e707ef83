"""ShardedKernel: a CodebookArray whose product every device of a mesh computes for its own rows and its own part of W.

Under shard_map, because XLA cannot partition a GPU kernel. And on any backend it would sum the dense gradient
[d_in, d_out] over all rows of all devices before it computes the codebook's [n, g]; here only the latter is exchanged.
Knows no model; the caller decides which side of which kernel is split.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
from jax.sharding import Mesh, PartitionSpec

from cluscomp_jax.core.codebook import CodebookArray

Side = Literal["in", "out"]


def spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Returns the PartitionSpec of these mesh axes, one entry a dimension."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["mesh", "rows", "columns", "side"])
@dataclasses.dataclass(frozen=True)
class ShardedKernel:
    """W [d_in, d_out] of `array` on a mesh.

    Attributes:
      array: the whole CodebookArray. Its codebook is gathered on every device; so is its index, less `side`.
      mesh: of the devices.
      rows: the mesh axes that the first axis of x is split over; their product divides it.
      columns: the mesh axis that W is split over.
      side: the side of W that is split, None for neither. A split cut side has no padding, the coding splits its
        lines, and the size of `columns` divides side and index.
    """

    array: CodebookArray
    mesh: Mesh
    rows: tuple[str, ...]
    columns: str
    side: Side | None

    def matmul(self, x: jax.Array) -> jax.Array:
        """Returns x @ W [b, ..., d_out] of x [b, ..., d_in] in the dtype of x, differentiable in x and codebook.

        Split along "in", the devices' parts of the sum are rounded to that dtype and added in float32.
        """
        between = (None,) * (x.ndim - 2)
        inner, outer = (self.columns if self.side == side else None for side in ("in", "out"))
        parts = self.mesh.shape[self.columns]
        d_in, d_out = self.array.matrix_shape
        shape = (d_in // parts if inner else d_in, d_out // parts if outer else d_out)
        form = dataclasses.replace(self.array.form, matrix_shape=shape)

        def product(x: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
            y = self.array.coding.matmul(form, x, codebook, index)
            return y[None] if inner else y

        whole = spec(self.rows, *between, outer)
        y: jax.Array = jax.shard_map(
            product,
            mesh=self.mesh,
            in_specs=(spec(self.rows, *between, inner), spec(), spec(inner, outer)),
            out_specs=spec(inner, *whole) if inner else whole,
            check_vma=False,  # the GPU kernels do not say along which axes their outputs vary
        )(x, self.array.codebook, self.array.index)
        # Parts that are added outside: a psum inside would be one more in the backward pass.
        return y.sum(0) if inner else y
