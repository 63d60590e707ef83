"""manifest.json: everything a compressed checkpoint says of itself, written, read and checked against itself.

Knows the names and sizes of the checkpoint's files and tensors, never their contents. docs/formats.md describes it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.entries import DTYPES, Entry, MatrixEntry, TensorEntry
from cluscomp_jax.core.codebook import MAX_CODES, MAX_GROUP
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime import json_files

FORMAT_VERSION = 2
"""The newest; what has no shared codebook is still written in version 1."""
MANIFEST_NAME = "manifest.json"
CONTENT_FOLDERS = ("blocks", "rest", "tokenizer")
"""The folders of a checkpoint that hold listed files, and nothing but listed files."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """The size in bytes and the SHA-256, in hex, of one file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Contents:
    """What one item, or a whole checkpoint, holds.

    Attributes:
      entries: {parameter path: entry}.
      files: {path within the checkpoint, "/"-joined: entry}.
    """

    entries: dict[str, Entry]
    files: dict[str, FileEntry]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form: matrices, tensors and files apart."""
        return {
            "matrices": {path: e.to_dict() for path, e in self.entries.items() if isinstance(e, MatrixEntry)},
            "tensors": {path: e.to_dict() for path, e in self.entries.items() if isinstance(e, TensorEntry)},
            "files": {path: dataclasses.asdict(entry) for path, entry in self.files.items()},
        }

    @property
    def format_version(self) -> int:
        """The lowest version that can say it: 2 where a codebook is another matrix's."""
        return 2 if any(isinstance(e, MatrixEntry) and e.tied_to for e in self.entries.values()) else 1

    @property
    def totals(self) -> dict[str, Any]:
        """The sums over all entries and files; bits_per_weight is of the compressed matrices (None without any)."""
        matrices = [e for e in self.entries.values() if isinstance(e, MatrixEntry)]
        tensors = [e for e in self.entries.values() if isinstance(e, TensorEntry)]
        weights = sum(math.prod(e.shape) for e in matrices)
        bits = sum(e.stored_bits for e in matrices)
        return {
            "matrices": len(matrices),
            "matrix_weights": weights,
            "matrix_bits": bits,
            "bits_per_weight": bits / weights if weights else None,
            "tensors": len(tensors),
            "tensor_weights": sum(math.prod(e.shape) for e in tensors),
            "tensor_bytes": sum(e.num_bytes for e in tensors),
            "file_bytes": sum(entry.size for entry in self.files.values()),
        }


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      package_version: of the cluscomp_jax that wrote it.
      fingerprint: of the run that wrote it.
      model_config: the model's Hugging Face config.json mapping.
      run_config: the settings of the run.
      contents: every parameter and every file but manifest.json itself.
      provenance, metrics: what the run says of its inputs, versions, times and errors; open to any JSON.
    """

    package_version: str
    fingerprint: str
    model_config: dict[str, Any]
    run_config: dict[str, Any]
    contents: Contents
    provenance: dict[str, Any]
    metrics: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, with the totals and, last, the digest of all the rest."""
        fields = {
            "format_version": self.contents.format_version,
            "package_version": self.package_version,
            "fingerprint": self.fingerprint,
            "model_config": self.model_config,
            "run_config": self.run_config,
            "totals": self.contents.totals,
            **self.contents.to_dict(),
            "provenance": self.provenance,
            "metrics": self.metrics,
        }
        return {**fields, "sha256": json_files.digest(fields)}


def package_version() -> str:
    """Returns the version of the installed cluscomp-jax."""
    return metadata.version("cluscomp-jax")


def read_manifest(path: Path) -> Manifest:
    """Returns the manifest in a file, every field checked for type, range and agreement with the others.

    Raises:
      InputError: the file is missing, damaged or not a manifest, or its format is newer than FORMAT_VERSION.
    """
    fields = json_files.read_object(path)
    version = fields.get("format_version")
    if type(version) is not int or version < 1:
        raise InputError(f"{path}: format_version is {version!r}; this is not a checkpoint of cluscomp_jax")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version} is newer than {FORMAT_VERSION}, the newest that cluscomp_jax "
            f"{package_version()} reads; install a newer cluscomp-jax"
        )
    claimed = fields.get("sha256")
    actual = json_files.digest({name: value for name, value in fields.items() if name != "sha256"})
    if claimed != actual:
        raise InputError(f"{path}: its content has SHA-256 {actual}, it says {claimed}; the file is damaged")
    manifest = Manifest(
        package_version=_field(fields, "package_version", str, path),
        fingerprint=_field(fields, "fingerprint", str, path),
        model_config=_field(fields, "model_config", dict, path),
        run_config=_field(fields, "run_config", dict, path),
        contents=parse_contents(fields, path),
        provenance=_field(fields, "provenance", dict, path),
        metrics=_field(fields, "metrics", dict, path),
    )
    again = manifest.to_dict()
    if again != fields:
        names = [name for name in {**again, **fields} if again.get(name) != fields.get(name) and name != "sha256"]
        raise InputError(f"{path}: {', '.join(names)} do not follow from the rest of the manifest; it is not ours")
    return manifest


def parse_contents(fields: Mapping[str, Any], where: Path) -> Contents:
    """Returns the Contents whose JSON form is `fields`.

    Raises:
      InputError: a missing field, a value of the wrong type or range, or a file path that leads out of the
        checkpoint's own folders; `where` names the file it was read from.
    """
    matrices = _field(fields, "matrices", dict, where)
    tensors = _field(fields, "tensors", dict, where)
    if both := matrices.keys() & tensors.keys():
        raise InputError(f"{where}: {sorted(both)[0]} is both a matrix and a tensor")
    entries: dict[str, Entry] = {path: _matrix(entry, f"{where}: {path}") for path, entry in matrices.items()}
    entries.update({path: _tensor(entry, f"{where}: {path}") for path, entry in tensors.items()})
    listed = _field(fields, "files", dict, where)
    return Contents(entries, {name: _file(name, entry, where) for name, entry in listed.items()})


def _field(fields: Any, name: str, kind: type, where: Any) -> Any:
    if not isinstance(fields, dict):
        raise InputError(f"{where} is {fields!r}; it must be an object")
    value = fields.get(name)
    if type(value) is not kind:
        raise InputError(f"{where}: {name} is {value!r}; it must be a {kind.__name__}")
    return value


def _count(fields: Any, name: str, highest: int, where: str) -> int:
    value = _field(fields, name, int, where)
    if not 1 <= value <= highest:
        raise InputError(f"{where}: {name} is {value}; it must be from 1 to {highest}")
    return value


def _shape(fields: Any, where: str) -> tuple[int, ...]:
    shape = _field(fields, "shape", list, where)
    if any(type(size) is not int or size < 1 for size in shape):
        raise InputError(f"{where}: shape is {shape}; its sizes must be integers of at least 1")
    return tuple(shape)


def _choice(fields: Any, name: str, choices: tuple[str, ...], where: str) -> Any:
    value = _field(fields, name, str, where)
    if value not in choices:
        raise InputError(f"{where}: {name} is {value!r}; it must be one of {', '.join(choices)}")
    return value


def _matrix(fields: Any, where: str) -> MatrixEntry:
    shape = _shape(fields, where)
    if len(shape) != 2:
        raise InputError(f"{where}: shape is {list(shape)}; a matrix has two sizes")
    return MatrixEntry(
        shape=(shape[0], shape[1]),
        axis=_choice(fields, "axis", ("out", "in"), where),
        group_size=_count(fields, "group_size", MAX_GROUP, where),
        num_codes=_count(fields, "num_codes", MAX_CODES, where),
        codebook_dtype=_choice(fields, "codebook_dtype", tuple(DTYPES), where),
        tied_to=_field(fields, "codebook_of", str, where) if "codebook_of" in fields else None,
    )


def _tensor(fields: Any, where: str) -> TensorEntry:
    return TensorEntry(_shape(fields, where), _choice(fields, "dtype", tuple(DTYPES), where))


def _file(name: str, fields: Any, where: Path) -> FileEntry:
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name
    if unsafe or len(parts) < 2 or parts[0] not in CONTENT_FOLDERS:
        raise InputError(f"{where}: file {name!r} is not in {', '.join(CONTENT_FOLDERS)} of the checkpoint")
    size, sha256 = _field(fields, "size", int, f"{where}: {name}"), _field(fields, "sha256", str, f"{where}: {name}")
    if size < 0 or not _SHA256.fullmatch(sha256):
        raise InputError(f"{where}: {name} has size {size} and SHA-256 {sha256!r}; the manifest is damaged")
    return FileEntry(size, sha256)
