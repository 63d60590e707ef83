"""What a tree that is to be loaded must look like: `like` and `dtype`, compared before anything is read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cluscomp_jax.checkpoint.entries import DTYPES, TREE_DTYPES, Entry, MatrixEntry
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import HostAxes, with_stack
from cluscomp_jax.errors import InputError

NUMBERS = (bool, int, float, complex)
"""Python's numbers, which are stored as arrays without axes."""
_SHOWN = 3


class Template:
    """The entries of a folder as they are to be loaded.

    Attributes:
      dtype: of floating arrays; None: as saved.
    """

    def __init__(self, root: Path, entries: Mapping[str, Entry], dtype: Any):
        """Raises InputError where `dtype` is none of DTYPES."""
        self._root, self._entries = root, entries
        self.dtype: np.dtype[Any] | None = None if dtype is None else np.dtype(dtype)
        if self.dtype is not None and self.dtype.name not in DTYPES:
            raise InputError(f"dtype is {self.dtype.name}; it must be one of {', '.join(DTYPES)}, or None")

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Returns if the leaves {path: leaf} are those of the folder.

        Raises:
          InputError: a path is missing on either side, or a leaf has another shape, dtype or kind.
        """
        for paths, where in (
            (wanted.keys() - self._entries.keys(), "like has {}, which the folder has not"),
            (self._entries.keys() - wanted.keys(), "the folder has {}, which like has not"),
        ):
            if paths:
                shown = ", ".join(map(repr, sorted(paths)[:_SHOWN]))
                more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
                raise InputError(f"{self._root}: {where.format(shown + more)}; give a tree of the same paths")
        for path, leaf in wanted.items():
            self._check_leaf(path, leaf)

    def _check_leaf(self, path: str, leaf: Any) -> None:
        entry = self._entries[path]
        shape, dtype = _shape(entry), self._dtype_of(entry)
        if isinstance(leaf, NUMBERS):
            leaf = np.asarray(leaf)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise InputError(f"{self._root}: {path} is an array, in like it is a {type(leaf).__name__}")
        if isinstance(leaf, CodebookArray) and not isinstance(entry, MatrixEntry):
            raise InputError(f"{self._root}: {path} is a dense array, in like it is clustered")
        if tuple(leaf.shape) != shape:
            raise InputError(f"{self._root}: {path} has shape {shape}, in like it has {tuple(leaf.shape)}")
        if isinstance(leaf, CodebookArray) and isinstance(entry, MatrixEntry):
            self._check_parts(path, leaf, entry)
        if dtype is not None and np.dtype(leaf.dtype) != dtype:
            raise InputError(
                f"{self._root}: {path} is {dtype.name}, in like it is {np.dtype(leaf.dtype).name}; change like, or "
                "give dtype="
            )

    def _check_parts(self, path: str, leaf: CodebookArray, entry: MatrixEntry) -> None:
        plain = HostAxes(entry.shape, (0, 1), 1)
        found = {
            "stack": entry.stack, "matrix shape": entry.shape, "axis": entry.axis, "codes": entry.num_codes,
            "group size": entry.group_size, "coding": entry.coding, "axes of the host": _axes(entry.host or plain),
        }  # fmt: skip
        expected = {
            "stack": leaf.stack, "matrix shape": tuple(leaf.matrix_shape), "axis": leaf.axis, "codes": leaf.num_codes,
            "group size": leaf.group_size, "coding": leaf.coding, "axes of the host": _axes(leaf.host or plain),
        }  # fmt: skip
        for name, value in found.items():
            if value != expected[name]:
                raise InputError(f"{self._root}: {path} has {name} {value}, in like {expected[name]}")

    def _dtype_of(self, entry: Entry) -> np.dtype[Any] | None:
        """Returns the dtype that a leaf must have in `like`; None where `dtype` or the codebook's decides."""
        if not isinstance(entry, MatrixEntry):
            dtype = TREE_DTYPES[entry.dtype]
        elif entry.host is None or entry.host.dtype is None:
            return None
        else:
            dtype = TREE_DTYPES[entry.host.dtype]
        return None if self.dtype is not None and jnp.issubdtype(dtype, jnp.floating) else dtype


def cast(path: str, leaf: Any, dtype: np.dtype[Any] | None) -> Any:
    """Returns a leaf with its floating numbers, and those that it decodes to, in `dtype`; None: as they are.

    Raises:
      InputError: a number is beyond the range of `dtype`.
    """
    if dtype is None:
        return leaf
    if not isinstance(leaf, CodebookArray):
        return _cast(path, leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    host = leaf.host
    if host is not None and host.dtype is not None:
        host = dataclasses.replace(host, dtype=dtype.name)
    return dataclasses.replace(leaf, codebook=_cast(path, leaf.codebook, dtype), host=host)


def _cast(path: str, array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        there = array.astype(dtype)
    if np.any(np.isinf(there) & ~np.isinf(array)):
        raise InputError(f"{path} has numbers beyond the range of {dtype.name}; give another dtype, or None")
    return there


def shardings(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: sharding} of the leaves of `like`: None where one has none, a CodebookArray of two for one."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, CodebookArray):
            return getattr(leaf, "sharding", None)
        parts = [getattr(part, "sharding", None) for part in (leaf.codebook, leaf.index)]
        return None if None in parts else dataclasses.replace(leaf, codebook=parts[0], index=parts[1])

    return {path: of(leaf) for path, leaf in wanted.items()}


def _shape(entry: Entry) -> tuple[int, ...]:
    if not isinstance(entry, MatrixEntry):
        return entry.shape
    if entry.host is None:
        return (*entry.stack, *entry.shape)
    return with_stack(entry.host.shape, entry.stack, entry.host.stack_at)


def _axes(host: HostAxes) -> tuple[Any, ...]:
    return host.shape, host.order, host.num_in, host.stack_at
