"""Fields of a manifest's JSON, each checked for type and range before it is used. Knows no whole manifest."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.entries import DTYPES, MatrixEntry
from cluscomp_jax.core.coding import MAX_CODES, MAX_GROUP, PLAIN, Coding, coding_of, coding_settings
from cluscomp_jax.errors import InputError

_MOST_AXES = 28
_MOST_NUMBERS = 2**56
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """The size in bytes and the SHA-256, in hex, of one file."""

    size: int
    sha256: str


def field(fields: Any, name: str, kind: type, where: Any) -> Any:
    """Returns the value of a field of a JSON object.

    Raises:
      InputError: no object, or the value is no `kind`; `where` names the object.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{where} is {fields!r}; it must be an object")
    value = fields.get(name)
    if type(value) is not kind:
        raise InputError(f"{where}: {name} is {value!r}; it must be a {kind.__name__}")
    return value


def count(fields: Any, name: str, highest: int, where: str) -> int:
    """Returns an integer field from 1 to `highest`.

    Raises:
      InputError: it is something else.
    """
    value = field(fields, name, int, where)
    if not 1 <= value <= highest:
        raise InputError(f"{where}: {name} is {value}; it must be from 1 to {highest}")
    return value


def read_shape(fields: Any, where: str, name: str = "shape", lowest: int = 1) -> tuple[int, ...]:
    """Returns a field that is a list of integers of at least `lowest`, and as a shape within NumPy's limits.

    Raises:
      InputError: it is something else.
    """
    shape = field(fields, name, list, where)
    if len(shape) > _MOST_AXES:
        raise InputError(f"{where}: {name} has {len(shape)} sizes; at most {_MOST_AXES} are read")
    if any(type(size) is not int or size < lowest for size in shape):
        raise InputError(f"{where}: {name} is {shape}; its sizes must be integers of at least {lowest}")
    if math.prod(max(size, 1) for size in shape) > _MOST_NUMBERS:
        raise InputError(f"{where}: {name} is {shape}; no array has so many numbers")
    return tuple(shape)


def choice(fields: Any, name: str, choices: Sequence[str], where: str) -> Any:
    """Returns a field that is one of `choices`.

    Raises:
      InputError: it is something else.
    """
    value = field(fields, name, str, where)
    if value not in choices:
        raise InputError(f"{where}: {name} is {value!r}; it must be one of {', '.join(choices)}")
    return value


def matrix_entry(fields: Any, where: str) -> MatrixEntry:
    """Returns the entry of one matrix without a host.

    Raises:
      InputError: a field is missing or has a value of the wrong type or range.
    """
    shape = read_shape(fields, where)
    if len(shape) != 2:
        raise InputError(f"{where}: shape is {list(shape)}; a matrix has two sizes")
    entry = MatrixEntry(
        shape=(shape[0], shape[1]),
        axis=choice(fields, "axis", ("out", "in"), where),
        group_size=count(fields, "group_size", MAX_GROUP, where),
        num_codes=count(fields, "num_codes", MAX_CODES, where),
        codebook_dtype=choice(fields, "codebook_dtype", tuple(DTYPES), where),
        tied_to=field(fields, "codebook_of", str, where) if "codebook_of" in fields else None,
        coding=_coding(fields, where),
    )
    entry.coding.check(entry.form, where)
    return entry


def _coding(fields: Any, where: str) -> Coding:
    if "coding" not in fields:
        return PLAIN
    settings = {name: fields[name] for name in coding_settings(field(fields, "coding", str, where)) if name in fields}
    return coding_of(fields["coding"], settings, where)


def file_entry(name: str, fields: Any, folders: Sequence[str], where: Path) -> FileEntry:
    """Returns the entry of a file, whose path `name` begins with one of the `folders` and does not leave it.

    Raises:
      InputError: another path, size or checksum.
    """
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name
    if unsafe or len(parts) < 2 or parts[0] not in folders:
        raise InputError(f"{where}: file {name!r} is not in {', '.join(folders)} of the checkpoint")
    size, sha256 = field(fields, "size", int, f"{where}: {name}"), field(fields, "sha256", str, f"{where}: {name}")
    if size < 0 or not _SHA256.fullmatch(sha256):
        raise InputError(f"{where}: {name} has size {size} and SHA-256 {sha256!r}; the manifest is damaged")
    return FileEntry(size, sha256)
