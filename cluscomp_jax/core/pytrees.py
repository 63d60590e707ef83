"""Any pytree by path: dicts, lists, registered dataclasses, equinox modules, nnx modules and states, linen boxes.

A path is the "/"-joined string of a leaf's keys, without the "value" of the box (an nnx.Variable, an nn.Partitioned)
that holds it, where there is one. A CodebookArray is a leaf. Nested dicts that hold nothing else have `trees`.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError


def is_codebook_array(leaf: Any) -> bool:
    """Returns whether `leaf` is a CodebookArray; the `is_leaf` of this package's trees."""
    return isinstance(leaf, CodebookArray)


def shape_struct(shape: Sequence[int], dtype: Any, sharding: Any = None) -> Any:
    """Returns the jax.ShapeDtypeStruct of a shape and a dtype."""
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)  # type: ignore[no-untyped-call]


def by_arrays(
    function: Callable[..., Any], arguments: Any, is_array: Callable[[Any], bool]
) -> tuple[Callable[..., Any], list[Any]]:
    """Returns (a function of the arrays among the leaves of `arguments`, those arrays); all other leaves are constants.

    Args:
      function: called as function(*arguments).
      arguments: a tuple of pytrees.
      is_array: whether a leaf is one of the arrays.
    """
    leaves, structure = jax.tree.flatten(arguments, is_leaf=is_codebook_array)
    where = [k for k, leaf in enumerate(leaves) if is_array(leaf)]

    def of_arrays(*arrays: Any) -> Any:
        filled = list(leaves)
        for k, array in zip(where, arrays, strict=True):
            filled[k] = array
        return function(*jax.tree.unflatten(structure, filled))

    return of_arrays, [leaves[k] for k in where]


def iterate(tree: Any, is_leaf: Callable[[Any], bool] = is_codebook_array) -> list[tuple[str, Any]]:
    """Returns [(path, leaf)] of the tree, in its order.

    Raises:
      InputError: two leaves have the same path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    outside, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: is_leaf(node) or _is_box(node))
    boxes = {tuple(keys) for keys, node in outside if _is_box(node)}
    found = [(_path(keys, boxes), leaf) for keys, leaf in leaves]
    seen: set[str] = set()
    for path, _ in found:
        if path in seen:
            raise InputError(f"two leaves of the tree have the path {path!r}; rename one of them")
        seen.add(path)
    return found


def map_by_path(
    function: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = is_codebook_array
) -> Any:
    """Returns the tree with every leaf replaced by `function(path, leaf)`."""
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    return jax.tree.unflatten(structure, [function(path, leaf) for path, leaf in iterate(tree, is_leaf)])


def _path(keys: Sequence[Any], boxes: Container[tuple[Any, ...]]) -> str:
    if keys and tuple(keys[:-1]) in boxes:
        keys = keys[:-1]
    return "/".join(str(getattr(key, name)) for key in keys for name in ("key", "name", "idx") if hasattr(key, name))


def _is_box(node: Any) -> bool:
    """Returns whether a node is an nnx.Variable or a box of linen; flax need not be imported for it."""
    return any(
        kind.__name__ in ("Variable", "AxisMetadata") and kind.__module__.startswith("flax.")
        for kind in type(node).__mro__
    )


def owner_path(path: str, tied_to: str | None, paths: Container[str]) -> str:
    """Returns the whole path of the kernel that stores the codebook of the one at `path`.

    Args:
      path: whole.
      tied_to: relative to a block around both kernels, the innermost that has it; None: the codebook is its own.
      paths: of all kernels of the tree.

    Raises:
      InputError: no such kernel is in the tree.
    """
    if tied_to is None:
        return path
    parents = path.split("/")[:-1]
    for depth in range(len(parents), -1, -1):
        owner = "/".join((*parents[:depth], tied_to))
        if owner in paths:
            return owner
    raise InputError(f"{path} has the codebook of {tied_to!r}, which is not in the tree; keep them together")
