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
      axis: the stacked axis of every array, 0 to 2.

    Raises:
      InputError: an array without that axis, or of another size along it.
    """
    _check_axis(axis)
    sizes = {path: _size(path, leaf, axis) for path, leaf in pytrees.iterate(tree)}
    for path, size in sizes.items():
        first = next(iter(sizes))
        if size != sizes[first]:
            raise InputError(f"{path} has {size} along axis {axis}, {first} has {sizes[first]}; unstack needs one size")

    def one(leaf: Any, i: int) -> Any:
        if isinstance(leaf, CodebookArray):
            codebook, index = (jnp.asarray(part)[_index(axis, i)] for part in (leaf.codebook, leaf.index))
            return dataclasses.replace(leaf, codebook=codebook, index=index)
        return leaf[_index(axis, i)]

    count = next(iter(sizes.values()), 0)
    return [jax.tree.map(lambda leaf, i=i: one(leaf, i), tree, is_leaf=pytrees.is_codebook_array) for i in range(count)]


def stack(blocks: Sequence[Any], axis: int = 0) -> Any:
    """Returns the blocks as one tree; `unstack` undoes it.

    Args:
      blocks: pytrees of one structure, with arrays and CodebookArrays of equal shapes; a codebook in bfloat16 makes all
        of its stack so.
      axis: where the stacked axis goes, 0 to 2.

    Raises:
      InputError: blocks that differ in structure, shape or kind, or leaves that are no arrays.
    """
    _check_axis(axis)
    if not isinstance(blocks, list | tuple) or not blocks:
        raise InputError(f"blocks is a {type(blocks).__name__}; it must be a list of at least one block")
    flat = [dict(pytrees.iterate(block)) for block in blocks]
    for i, block in enumerate(flat):
        if list(block) != list(flat[0]):
            raise InputError(f"block {i} has other paths than block 0; only equal blocks can be stacked")
        for path, leaf in block.items():
            if _kind(path, leaf, axis) != _kind(path, flat[0][path], axis):
                raise InputError(
                    f"{path} differs in block {i} from block 0; only equal shapes and kinds can be stacked"
                )

    def joined(path: str, _: Any) -> Any:
        leaves = [block[path] for block in flat]
        return _stacked(leaves, axis) if isinstance(leaves[0], CodebookArray) else jnp.stack(leaves, axis)

    return pytrees.map_by_path(joined, blocks[0])


def _stacked(leaves: Sequence[CodebookArray], axis: int) -> CodebookArray:
    one, same = leaves[0], {jnp.dtype(w.codebook.dtype) for w in leaves}
    dtype = same.pop() if len(same) == 1 else jnp.bfloat16
    host = one.host or HostAxes(one.matrix_shape, (0, 1), 1)
    codebook = jnp.stack([jnp.asarray(w.codebook).astype(dtype) for w in leaves], axis)
    index = jnp.stack([jnp.asarray(w.index) for w in leaves], axis)
    return dataclasses.replace(one, codebook=codebook, index=index, host=dataclasses.replace(host, stack_at=axis))


def _check_axis(axis: int) -> None:
    if axis not in (0, 1, 2):
        raise InputError(f"axis is {axis}; the stacked axis is 0, 1 or 2")


def _index(axis: int, i: int) -> tuple[Any, ...]:
    return (*(slice(None),) * axis, i)


def _size(path: str, leaf: Any, axis: int) -> int:
    """Returns the size of a leaf along the stacked axis."""
    if isinstance(leaf, CodebookArray):
        at = 0 if leaf.host is None else leaf.host.stack_at
        if not leaf.stack or at != axis:
            where = f"is stacked at axis {at}" if leaf.stack else "is not stacked"
            raise InputError(f"{path} {where}; unstack was asked for axis {axis}")
        return leaf.stack[0]
    if len(getattr(leaf, "shape", ())) <= axis:
        raise InputError(f"{path} has no axis {axis}; every leaf must be an array that is stacked along it")
    return int(leaf.shape[axis])


def _kind(path: str, leaf: Any, axis: int) -> tuple[Any, ...]:
    """Returns what must be equal in two leaves that are stacked."""
    if not hasattr(leaf, "shape"):
        raise InputError(f"{path} is a {type(leaf).__name__}; only arrays can be stacked")
    if not isinstance(leaf, CodebookArray):
        return tuple(leaf.shape), jnp.dtype(leaf.dtype)
    at = 0 if leaf.host is None else leaf.host.stack_at
    if leaf.stack and at != axis:
        raise InputError(
            f"{path} is stacked at axis {at} already; its stacked axes must be neighbours, so use axis={at}"
        )
    host = None if leaf.host is None else dataclasses.replace(leaf.host, stack_at=0)
    return leaf.matrix_shape, leaf.num_codes, leaf.group_size, leaf.axis, leaf.tied_to, leaf.stack, host
