"""Parameter trees by path: flatten, rebuild and map nested dicts.

A path is the "/"-joined string of a leaf's keys. Knows nothing of models or of what a leaf is, except
that anything that is not a mapping is a leaf.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluscomp_jax.errors import InputError

Params = dict[str, Any]


def iterate(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf) in the order of the mapping; integer keys become their decimal strings."""
    for key, value in tree.items():
        name = str(key)
        if not name or "/" in name:
            raise InputError(
                f"parameter key {name!r} under {prefix or 'the root'!r}: keys must be non-empty and free of '/'"
            )
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from iterate(value, path)
        else:
            yield path, value


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns {path: leaf}.

    Raises:
      InputError: a key is empty or contains "/", or two keys spell the same path (1 and "1").
    """
    flat: dict[str, Any] = {}
    for path, leaf in iterate(tree):
        if path in flat:
            raise InputError(f"parameter path {path!r} appears twice (an integer and a string key?)")
        flat[path] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Returns the nested dict whose `flatten` is `flat`.

    Raises:
      InputError: one path is a prefix of another.
    """
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"parameter path {path!r} runs through another leaf at {parent!r}")
        if last in node:
            raise InputError(f"parameter path {path!r} is both a leaf and a folder of leaves")
        node[last] = leaf
    return tree


def map_by_path(function: Callable[[str, Any], Any], tree: Mapping[Any, Any]) -> Params:
    """Returns the tree with every leaf replaced by `function(path, leaf)`."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def subtree(tree: Mapping[Any, Any], path: str) -> Params:
    """Returns the mapping at `path`.

    Raises:
      InputError: nothing, or a leaf, is there.
    """
    node: Any = tree
    for name in path.split("/"):
        # nnx pure dicts number their layers with integers.
        key = int(name) if isinstance(node, Mapping) and name not in node and name.isdigit() else name
        if not isinstance(node, Mapping) or key not in node:
            raise InputError(f"the parameters have no {path!r}")
        node = node[key]
    if not isinstance(node, Mapping):
        raise InputError(f"the parameters hold an array at {path!r}, not a subtree")
    return unflatten(flatten(node))


def without(tree: Mapping[Any, Any], path: str) -> Params:
    """Returns the tree less everything at or below `path`."""
    return unflatten({p: leaf for p, leaf in flatten(tree).items() if p != path and not p.startswith(path + "/")})
