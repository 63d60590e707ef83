"""tree.json: everything that the folder of a saved tree says of itself, written, read and checked against itself.

Knows the names and sizes of files and arrays, never their contents. docs/formats.md describes it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax.numpy as jnp

from cluscomp_jax.checkpoint import inventory
from cluscomp_jax.checkpoint.entries import (
    TREE_DTYPES,
    ArraySpec,
    Entry,
    MatrixEntry,
    TensorEntry,
    check_owners,
    stored_arrays,
)
from cluscomp_jax.checkpoint.fields import choice, field, file_entry, matrix_entry, read_shape
from cluscomp_jax.checkpoint.manifest import TREE_NAME, Contents, package_version
from cluscomp_jax.core import pytrees
from cluscomp_jax.core.host_axes import HostAxes
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime import json_files

FORMAT_VERSION = 2
ITEM = "arrays"
"""The folder of the one orbax item."""

_ROOT = "tree"
"""The first key of every path in the item, so that no name of an array is one of orbax's own files."""
_LONGEST_NAME = 255
_FLOATING = tuple(name for name, dtype in TREE_DTYPES.items() if jnp.issubdtype(dtype, jnp.floating))


def item_path(path: str) -> str:
    """Returns the path of a parameter in the item: below `tree`, what is not plain in a file's name as "%XX"."""
    parts = [quote(part, safe="").replace(".", "%2E") or "%" for part in path.split("/")]
    return "/".join((_ROOT, *parts)) if path else _ROOT


def expected_arrays(entries: Mapping[str, Entry]) -> dict[str, ArraySpec]:
    """Returns {path in the item: (shape, dtype)} of all arrays.

    Raises:
      InputError: two arrays have one place, or the name of a file would be too long.
    """
    expected: dict[str, ArraySpec] = {}
    for path, entry in entries.items():
        stored = stored_arrays(item_path(path), entry)
        if stored.keys() & expected.keys():
            raise InputError(f"{path}: the codebook and index of a kernel have this place; rename one of the two")
        expected.update(stored)
        if len(item_path(path)) + len("/codebook") > _LONGEST_NAME:
            raise InputError(f"{path[:60]}…: a path of {len(path)} characters is too long for the name of a file")
    return expected


def owners(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Returns {path of a matrix: path of the one that stores its codebook, itself included}."""
    matrices = {path: entry for path, entry in entries.items() if isinstance(entry, MatrixEntry)}
    return {path: pytrees.owner_path(path, entry.tied_to, matrices) for path, entry in matrices.items()}


def to_dict(contents: Contents) -> dict[str, Any]:
    """Returns the JSON form, with the totals and, last, the digest of all the rest."""
    fields = {
        "format_version": 2 if contents.format_version > 2 else 1,  # 2: an index that is not plain
        "package_version": package_version(),
        "totals": contents.totals,
        **contents.to_dict(),
    }
    for path, owner in owners(contents.entries).items():
        if owner != path:
            fields["matrices"][path]["codebook_at"] = owner
    return {**fields, "sha256": json_files.digest(fields)}


def open_tree(root: Path) -> Contents:
    """Returns what a folder of a saved tree holds; its files are there, of their sizes. Reads tree.json alone.

    Raises:
      InputError: the folder is something else, damaged, newer, or would take far more memory than it has bytes.
    """
    where = root / TREE_NAME
    fields = json_files.read_object(where)
    version = fields.get("format_version")
    if type(version) is not int or version < 1:
        raise InputError(f"{where}: format_version is {version!r}; this is no tree of cluscomp_jax")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where}: format version {version} is newer than {FORMAT_VERSION}; install a newer cluscomp-jax"
        )
    contents = parse(fields, where)
    check_owners(contents.entries, where)
    again = {**to_dict(contents), "package_version": field(fields, "package_version", str, where)}
    again["sha256"] = json_files.digest({name: value for name, value in again.items() if name != "sha256"})
    if again != fields:
        names = [name for name in {**again, **fields} if again.get(name) != fields.get(name)]
        raise InputError(f"{where}: {', '.join(names)} do not follow from the rest; the file is damaged or not ours")
    inventory.check_files(root, contents, (ITEM,))
    inventory.check_expansion(root, {ITEM: contents})
    return contents


def parse(fields: Mapping[str, Any], where: Path) -> Contents:
    """Returns the Contents whose JSON form is `fields`.

    Raises:
      InputError: a missing field, a value of the wrong type or range, or a file outside the item.
    """
    matrices, tensors = field(fields, "matrices", dict, where), field(fields, "tensors", dict, where)
    if both := matrices.keys() & tensors.keys():
        raise InputError(f"{where}: {sorted(both)[0]} is both a matrix and a tensor")
    entries: dict[str, Entry] = {path: _matrix(entry, f"{where}: {path}") for path, entry in matrices.items()}
    entries.update({path: _tensor(entry, f"{where}: {path}") for path, entry in tensors.items()})
    files = field(fields, "files", dict, where)
    return Contents(entries, {name: file_entry(name, entry, (ITEM,), where) for name, entry in files.items()})


def _tensor(fields: Any, where: str) -> TensorEntry:
    return TensorEntry(read_shape(fields, where, lowest=0), choice(fields, "dtype", tuple(TREE_DTYPES), where))


def _matrix(fields: Any, where: str) -> MatrixEntry:
    entry = matrix_entry(fields, where)
    stack = read_shape(fields, where, "stack") if "stack" in fields else ()
    host = _host(fields["host"], f"{where}: host") if "host" in fields else None
    if host is not None and host.matrix_shape != entry.shape:
        raise InputError(f"{where}: the host's axes make {host.matrix_shape}, the matrix is {entry.shape}")
    return dataclasses.replace(entry, stack=stack, host=host)


def _host(fields: Any, where: str) -> HostAxes:
    shape, order = read_shape(fields, where), read_shape(fields, where, "order", lowest=0)
    num_in, at = field(fields, "num_in", int, where), field(fields, "stack_at", int, where)
    if sorted(order) != list(range(len(shape))) or not 0 <= num_in <= len(order) or not 0 <= at <= min(2, len(order)):
        raise InputError(
            f"{where}: order {list(order)}, num_in {num_in} and stack_at {at} are no axes of {list(shape)}"
        )
    dtype = None if fields.get("dtype") is None else choice(fields, "dtype", _FLOATING, where)
    return HostAxes(shape, order, num_in, at, dtype)
