"""A stack of blocks, as `lax.scan` takes it, and the blocks one by one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core import pytrees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import HostAxes, with_stack
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
        if not isinstance(leaves[0], CodebookArray):
            return jnp.stack(leaves, axis)
        host = leaves[0].host or HostAxes(leaves[0].matrix_shape, (0, 1), 1)
        return join(leaves, dataclasses.replace(host, stack_at=axis), (len(leaves),), jnp)

    return pytrees.map_by_path(joined, blocks[0])


def join(parts: Sequence[CodebookArray], host: HostAxes, stack: tuple[int, ...], numpy: Any) -> CodebookArray:
    """Returns CodebookArrays as one; one codebook in another dtype makes all bfloat16.

    Args:
      parts: equal in all that is static; the first says what `host` does not.
      host: of the result, whose stacked axes begin at its `stack_at`.
      stack: their sizes, of the product len(parts); (): of one part, which is not stacked.
      numpy: the module, numpy or jax.numpy, whose arrays the result has.
    """
    same = {jnp.dtype(part.codebook.dtype) for part in parts}
    dtype = same.pop() if len(same) == 1 else jnp.bfloat16

    def joined(leaves: list[Any]) -> Any:
        if not stack:
            return leaves[0]
        whole = numpy.stack(leaves, host.stack_at)
        return whole.reshape(with_stack(leaves[0].shape, stack, host.stack_at))

    return dataclasses.replace(
        parts[0],
        codebook=joined([numpy.asarray(part.codebook).astype(dtype) for part in parts]),
        index=joined([numpy.asarray(part.index) for part in parts]),
        host=host,
    )


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
    return leaf.matrix_shape, leaf.num_codes, leaf.group_size, leaf.axis, leaf.tied_to, leaf.stack, host, leaf.coding
