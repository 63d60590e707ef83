"""A stack of blocks, as `lax.scan` takes it, and the blocks one by one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core import pytrees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import HostAxes
from cluscomp_jax.errors import InputError


def unstack(tree: Any, axis: int = 0) -> list[Any]:
    """Returns the blocks of a tree whose arrays all have a stacked axis; CodebookArrays are taken apart too.

    Args:
      tree: pytree of arrays and CodebookArrays.
      axis: the stacked axis of every array.

    Raises:
      InputError: an array without that axis, or of another size along it.
    """
    leaves = pytrees.iterate(tree)
    sizes = {path: leaf.shape[axis] if len(leaf.shape) > axis else None for path, leaf in leaves}
    first = next(iter(sizes.values()), None)
    for path, size in sizes.items():
        if size is None or size != first:
            raise InputError(
                f"{path} has {size} along axis {axis}, {next(iter(sizes))} has {first}; unstack needs one size"
            )

    def one(leaf: Any, i: int) -> Any:
        if isinstance(leaf, CodebookArray):
            at = 0 if leaf.host is None else leaf.host.stack_at
            if not leaf.stack or at != axis:
                raise InputError(f"a CodebookArray is stacked at axis {at}, not {axis}")
            parts = (jnp.take(jnp.asarray(part), i, axis) for part in (leaf.codebook, leaf.index))
            return dataclasses.replace(leaf, codebook=next(parts), index=next(parts))
        return leaf[(slice(None),) * axis + (i,)]

    return [
        jax.tree.map(lambda leaf, i=i: one(leaf, i), tree, is_leaf=pytrees.is_codebook_array) for i in range(first or 0)
    ]


def stack(blocks: Sequence[Any], axis: int = 0) -> Any:
    """Returns the blocks as one tree; `unstack` undoes it.

    Args:
      blocks: pytrees of one structure, with arrays and CodebookArrays of equal shapes; a codebook in bfloat16 makes all
        of its stack so.
      axis: where the stacked axis goes, 0 to 2.

    Raises:
      InputError: blocks that differ in structure or shape.
    """
    first: Any = jax.tree.structure(blocks[0], is_leaf=pytrees.is_codebook_array)

    def joined(*leaves: Any) -> Any:
        if not isinstance(leaves[0], CodebookArray):
            return jnp.stack(leaves, axis)
        one = leaves[0]
        if any((w.matrix_shape, w.num_codes, w.group_size, w.axis) != _kind(one) for w in leaves):
            raise InputError("CodebookArrays of different shapes or numbers of codes cannot be stacked")
        same = {jnp.dtype(w.codebook.dtype) for w in leaves}
        dtype = same.pop() if len(same) == 1 else jnp.bfloat16
        host = one.host or HostAxes(one.matrix_shape, (0, 1), 1, 0)
        codebook = jnp.stack([jnp.asarray(w.codebook).astype(dtype) for w in leaves], axis)
        index = jnp.stack([jnp.asarray(w.index) for w in leaves], axis)
        return dataclasses.replace(one, codebook=codebook, index=index, host=dataclasses.replace(host, stack_at=axis))

    for i, block in enumerate(blocks):
        if jax.tree.structure(block, is_leaf=pytrees.is_codebook_array) != first:
            raise InputError(f"block {i} has another structure than block 0; only equal blocks can be stacked")
    return jax.tree.map(joined, *blocks, is_leaf=pytrees.is_codebook_array)


def _kind(w: CodebookArray) -> tuple[Any, ...]:
    return w.matrix_shape, w.num_codes, w.group_size, w.axis
