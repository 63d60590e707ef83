"""Any pytree by path: dicts, lists, registered dataclasses, equinox modules, nnx modules and states, linen boxes.

A path is the "/"-joined string of a leaf's keys, without the "value" of the box (an nnx.Variable, an nn.Partitioned)
that holds it. A CodebookArray is a leaf. Nested dicts that hold nothing else have `trees`.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

import jax

from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError


def is_codebook_array(leaf: Any) -> bool:
    """Returns whether `leaf` is a CodebookArray; the `is_leaf` of this package's trees."""
    return isinstance(leaf, CodebookArray)


def key_path(keys: Sequence[Any]) -> str:
    """Returns the path of the keys of `jax.tree_util.tree_flatten_with_path`."""
    names = [(name, getattr(key, name)) for key in keys for name in ("key", "name", "idx") if hasattr(key, name)]
    if len(names) > 1 and names[-1] == ("name", "value"):
        names.pop()
    return "/".join(str(name) for _, name in names)


def iterate(tree: Any) -> list[tuple[str, Any]]:
    """Returns [(path, leaf)] of the tree, in its order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_codebook_array)
    return [(key_path(keys), leaf) for keys, leaf in leaves]


def map_by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns the tree with every leaf replaced by `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(key_path(keys), leaf), tree, is_leaf=is_codebook_array
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
