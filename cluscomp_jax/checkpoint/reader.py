"""Compressed checkpoints opened, read, saved and loaded. docs/formats.md describes the folder.

`open_checkpoint` streams block by block; `load_checkpoint` and `save_checkpoint` are for models that fit in memory.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluscomp_jax.checkpoint import inventory
from cluscomp_jax.checkpoint.inventory import CARRIED, REST, TOKENIZER, block_folder
from cluscomp_jax.checkpoint.manifest import MANIFEST_NAME, TREE_NAME, Contents, Manifest, read_manifest
from cluscomp_jax.checkpoint.orbax_items import TIME_STAMPED
from cluscomp_jax.checkpoint.run_folder import RUN_NAME
from cluscomp_jax.checkpoint.writer import CheckpointWriter
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model, build_model, parse_model_config
from cluscomp_jax.models.source import ParamSource, as_source, load_all


class CheckpointSource:
    """A ParamSource over a finished checkpoint; holds nothing but its manifest. Made by `open_checkpoint`.

    Attributes:
      path: the checkpoint folder.
      manifest: what it says of itself.
      model_config: the family's config.
    """

    def __init__(self, path: Path, manifest: Manifest, model: Model, parts: Mapping[str, Contents]):
        self.path = path
        self.manifest = manifest
        self.model_config = model.config
        self._model = model
        self._parts = parts

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder of the tokenizer's files, or None if none was carried along."""
        return self.path / TOKENIZER if TOKENIZER in self._parts else None

    @property
    def has_carried(self) -> bool:
        """Whether the model is the text model of a larger one, of which the rest was carried along."""
        return CARRIED in self._parts

    def carried_path(self) -> Path | None:
        """Returns the folder of what is around the text model, its files verified; None: the model is not nested.

        Raises:
          InputError: a file of it is damaged.
        """
        if not self.has_carried:
            return None
        inventory.verify(self.path, self._parts[CARRIED])
        return self.path / CARRIED

    def load_block(self, i: int) -> Params:
        """Returns block i by block-relative paths: NumPy arrays, and CodebookArrays of NumPy arrays.

        Raises:
          InputError: a file of the block is damaged.
        """
        return self._load(block_folder(i))

    def load_outer(self) -> Params:
        """Returns everything outside the blocks, by full paths.

        Raises:
          InputError: a file of it is damaged.
        """
        return self._load(REST)

    def fingerprint(self) -> str:
        """Returns a hex digest of the parameters: equal whenever they, their codes and their layout are."""
        fields = self.manifest.contents.to_dict()
        stable = {
            n: e for n, e in fields["files"].items() if not n.startswith(TOKENIZER) and not n.endswith(TIME_STAMPED)
        }
        text = json.dumps({**fields, "files": stable}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _load(self, folder: str) -> Params:
        prefix = inventory.item_prefix(self._model, folder)
        return inventory.load_item(self.path, folder, self._parts[folder], prefix=prefix)


def open_checkpoint(path: str | Path, *, verify: bool = False) -> CheckpointSource:
    """Returns a source over a checkpoint whose manifest, model config and files fit each other.

    Every file must be there, of its size, and no file that is not listed. The tokenizer's files are verified now;
    every other file is whenever its item is read, or now too with `verify`.

    Raises:
      InputError: no finished checkpoint, a newer format, damage, items that would take far more memory than they have
        bytes of files, or a model this version cannot serve.
    """
    root = Path(path)
    manifest, model, parts = _open(root)
    inventory.verify(root, manifest.contents if verify else parts.get(TOKENIZER, Contents({}, {})))
    return CheckpointSource(root, manifest, model, parts)


def describe(path: str | Path) -> dict[str, Any]:
    """Returns the JSON form of a checkpoint's manifest, checked as `open_checkpoint` does; reads no tensor.

    Raises:
      InputError: as `open_checkpoint`.
    """
    manifest, _, _ = _open(Path(path))
    return manifest.to_dict()


class LoadedCheckpoint(NamedTuple):
    """A whole checkpoint in memory.

    Attributes:
      params: the nested dict, NumPy arrays and CodebookArrays of NumPy arrays.
      model_config: the family's config.
    """

    params: Params
    model_config: Any


def load_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """Returns the parameters and the model config of a checkpoint, every file verified.

    Raises:
      InputError: as `open_checkpoint`, or a damaged file.
    """
    source = open_checkpoint(path)
    return LoadedCheckpoint(load_all(source, build_model(source.model_config)), source.model_config)


def save_checkpoint(
    path: str | Path,
    params: Mapping[Any, Any] | ParamSource,
    cfg: Any,
    *,
    provenance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Callable[[Path], Any] | None = None,
    carried: Callable[[Path], Any] | None = None,
) -> None:
    """Saves a model whole or not at all; if interrupted, the same call resumes.

    Args:
      path: absent, or an empty folder.
      params: the nested dict, dense or compressed, or a source of it.
      cfg: its `model` is the family's config, its `to_dict()` the settings that are recorded: a CompressConfig.
      provenance: any JSON to record of where it came from.
      metrics: any JSON to record of what was measured.
      tokenizer: as for `CheckpointWriter.store_tokenizer`.
      carried: as for `CheckpointWriter.store_carried`: `open_model(...).carried.write` of a vision-language model.

    Raises:
      AlreadyFinished: this very model is saved there.
      InputError: the folder holds anything else or cannot be written to, or params and cfg.model do not fit.
      RunError: the disk is full or fails.
    """
    model = build_model(cfg.model)
    source = as_source(params, model)
    with CheckpointWriter(
        path, model_config=cfg.model, run_config=cfg.to_dict(), fingerprint=source.fingerprint()
    ) as writer:
        for i in range(writer.finished_blocks, model.num_blocks):
            writer.store_block(i, source.load_block(i))
        writer.store_outer(source.load_outer())
        if tokenizer is not None:
            writer.store_tokenizer(tokenizer)
        if carried is not None:
            writer.store_carried(carried)
        writer.finish(provenance=provenance or {}, metrics=metrics or {})


def _open(root: Path) -> tuple[Manifest, Model, dict[str, Contents]]:
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "no such folder"
        raise InputError(f"{root}: {found}; give the folder of a compressed checkpoint")
    if not (root / MANIFEST_NAME).exists():
        if (root / RUN_NAME).exists():
            raise InputError(f"{root}: an unfinished run; repeat the command that began it, which resumes")
        if (root / TREE_NAME).exists():
            raise InputError(f"{root}: a tree that cluscomp_jax.save wrote, no model; read it with cluscomp_jax.load")
        raise InputError(
            f"{root}: has no {MANIFEST_NAME}; it is not a compressed checkpoint; give the output folder of compress"
        )
    manifest = read_manifest(root / MANIFEST_NAME)
    model = build_model(parse_model_config(manifest.model_config))
    parts = inventory.split(manifest.contents, model, root / MANIFEST_NAME)
    inventory.check_files(root, manifest.contents)
    inventory.check_expansion(root, parts)
    return manifest, model, parts
