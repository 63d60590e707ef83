"""manifest.json: everything a compressed checkpoint says of itself, written, read and checked against itself.

Knows the names and sizes of the checkpoint's files and tensors, never their contents. docs/formats.md describes it.
"""

import dataclasses
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.entries import DTYPES, Entry, MatrixEntry, TensorEntry
from cluscomp_jax.checkpoint.fields import FileEntry, choice, field, file_entry, matrix_entry, read_shape
from cluscomp_jax.core.coding import PLAIN
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime import json_files

FORMAT_VERSION = 4
"""The newest; what has no shared codebook is still written in version 1."""
MANIFEST_NAME = "manifest.json"
TREE_NAME = "tree.json"
"""The manifest of a tree that is no model (`tree_manifest`)."""
CONTENT_FOLDERS = ("blocks", "rest", "tokenizer", "carried")
"""The folders of a checkpoint that hold listed files, and nothing but listed files."""


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
        """The lowest version that can say it.

        2 where a codebook is another matrix's, 3 where an index is not plain, 4 where tensors are carried along.
        """
        if any(name.startswith("carried/") for name in self.files):
            return 4
        matrices = [e for e in self.entries.values() if isinstance(e, MatrixEntry)]
        if any(e.coding != PLAIN for e in matrices):
            return 3
        return 2 if any(e.tied_to for e in matrices) else 1

    @property
    def totals(self) -> dict[str, Any]:
        """The sums over all entries and files; bits_per_weight is of the compressed matrices (None without any)."""
        matrices = [e for e in self.entries.values() if isinstance(e, MatrixEntry)]
        tensors = [e for e in self.entries.values() if isinstance(e, TensorEntry)]
        weights = sum(e.num_weights for e in matrices)
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
        package_version=field(fields, "package_version", str, path),
        fingerprint=field(fields, "fingerprint", str, path),
        model_config=field(fields, "model_config", dict, path),
        run_config=field(fields, "run_config", dict, path),
        contents=parse_contents(fields, path),
        provenance=field(fields, "provenance", dict, path),
        metrics=field(fields, "metrics", dict, path),
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
    matrices = field(fields, "matrices", dict, where)
    tensors = field(fields, "tensors", dict, where)
    if both := matrices.keys() & tensors.keys():
        raise InputError(f"{where}: {sorted(both)[0]} is both a matrix and a tensor")
    entries: dict[str, Entry] = {path: matrix_entry(entry, f"{where}: {path}") for path, entry in matrices.items()}
    entries.update({path: _tensor(entry, f"{where}: {path}") for path, entry in tensors.items()})
    listed = field(fields, "files", dict, where)
    return Contents(entries, {name: file_entry(name, entry, CONTENT_FOLDERS, where) for name, entry in listed.items()})


def _tensor(fields: Any, where: str) -> TensorEntry:
    return TensorEntry(read_shape(fields, where), choice(fields, "dtype", tuple(DTYPES), where))
