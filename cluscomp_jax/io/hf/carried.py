"""What a Hugging Face folder holds around its text model: tensors and files that pass through as they are.

Also the folder in which a compressed checkpoint keeps them: the same files, and safetensors of these tensors alone.
Knows neither the text model nor what the tensors mean.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from cluscomp_jax.checkpoint.writer import TOKENIZER_FILES
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.safetensors_file import Entry, read_tensor
from cluscomp_jax.io.hf.safetensors_source import SafetensorsSource, open_tensors
from cluscomp_jax.io.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from cluscomp_jax.models.nesting import NestedNames
from cluscomp_jax.runtime import atomic, json_files
from cluscomp_jax.runtime.file_stamps import FileStamps

_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    *TOKENIZER_FILES,
)
"""The files of a folder that its model, its processor and its tokenizer are read from."""
_NAMES = "text_model.json"
_SHARD_BYTES = 5 * 10**9


class Carried:
    """The tensors and files around a text model. It holds their places, not their contents.

    Attributes:
      folder: of the files.
      names: how the folder's model names the tensors of its text model.
      entries: {name: entry} of the tensors outside of it.
      files: the names of the files, config.json first.
    """

    def __init__(self, folder: Path, names: NestedNames, entries: Mapping[str, Entry], stamps: FileStamps):
        self.folder, self.names, self.entries = folder, names, dict(entries)
        self.files = tuple(name for name in _FILES if (folder / name).is_file())
        self._stamps = stamps

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors, in the order of `entries`."""
        return [TensorSpec(name, entry.dtype, entry.shape) for name, entry in self.entries.items()]

    def digest(self) -> str:
        """Returns the SHA-256 of the files, and of the names, shapes and dtypes of the tensors; not of their data."""
        digest = hashlib.sha256(repr([(s.name, s.dtype.name, s.shape) for s in self.specs]).encode())
        for name in self.files:
            digest.update(name.encode() + (self.folder / name).read_bytes())
        return digest.hexdigest()

    def write_tensors(self, writer: SafetensorsWriter) -> None:
        """Writes every tensor, one at a time, its bytes as they are.

        Raises:
          InputError: a file was changed since it was opened.
        """
        with self._stamps.held():
            for entry in self.entries.values():
                writer.write(read_tensor(entry))

    def copy_files(self, to: Path) -> None:
        """Copies the files into a folder, their bytes as they are."""
        for name in self.files:
            shutil.copyfile(self.folder / name, to / name)

    def write(self, to: Path) -> None:
        """Writes all into an empty folder, from which `open_carried` reads it.

        Raises:
          InputError: a file was changed since it was opened.
        """
        atomic.require_space(to, sum(spec.num_bytes for spec in self.specs))
        with SafetensorsWriter(to, self.specs, shard_bytes=_SHARD_BYTES) as writer:
            self.write_tensors(writer)
        self.copy_files(to)
        (to / _NAMES).write_text(json.dumps({"prefixes": self.names.prefixes}) + "\n", encoding="utf-8")


def carried_of(folder: Path, source: SafetensorsSource) -> Carried | None:
    """Returns what a Hugging Face folder holds around the text model that `source` reads; None: it is not nested.

    Raises:
      InputError: every tensor is the text model's.
    """
    if source.nested_names is None:
        return None
    if not source.carried:
        raise InputError(
            f"{folder}: config.json is of a model with a text model inside, but all tensors are the text model's; "
            "fetch the other files too, or give a folder of the text model alone"
        )
    return Carried(folder, source.nested_names, source.carried, source.stamps)


def open_carried(folder: Path) -> Carried:
    """Returns what `Carried.write` wrote into a folder.

    Raises:
      InputError: it is not such a folder.
    """
    prefixes = json_files.read_object(folder / _NAMES).get("prefixes")
    if not isinstance(prefixes, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in prefixes
    ):
        raise InputError(f"{folder / _NAMES}: prefixes is {prefixes!r:.80}; pairs of strings are expected")
    files, entries = open_tensors(folder)
    names = NestedNames(tuple((stored, plain) for stored, plain in prefixes))
    return Carried(folder, names, entries, FileStamps(files))
