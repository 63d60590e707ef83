"""CheckpointWriter: a compressed checkpoint written block by block, resumable after any interruption.

Every item is written in work/, synced, recorded, and renamed to its place, so an item at its place is whole. Holds
one block at a time. Does not know what a run computes.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cluscomp_jax.checkpoint import inventory, orbax_items
from cluscomp_jax.checkpoint.entries import Entry, check_shared, encode
from cluscomp_jax.checkpoint.inventory import BLOCKS, CARRIED, REST, TOKENIZER, block_folder
from cluscomp_jax.checkpoint.manifest import Contents, Manifest, package_version, parse_contents
from cluscomp_jax.checkpoint.run_folder import WORK_NAME, Identity, RunFolder
from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import build_model, model_config_to_dict
from cluscomp_jax.runtime import atomic, json_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""The files of a Hugging Face folder that are carried along as its tokenizer."""


def run_work_path(path: Path) -> Path:
    """Returns `work_path` of the CheckpointWriter of `path`, for processes that work for a run but do not write it."""
    return path / WORK_NAME / "run"


class CheckpointWriter:
    """A BlockSink that makes one checkpoint folder; nothing in it loads before `finish` has returned.

    Use as a context manager: on the way out the lock is given back, and a run that has stored nothing, and put
    nothing else into the folder, leaves no files.

    Attributes:
      path: the checkpoint folder.
      work_path: a folder on the same disk for whatever the run needs until it ends; `finish` removes it.
      resumed: whether an earlier process had begun this run.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model_config: Any,
        run_config: Mapping[str, Any],
        fingerprint: str,
        inputs: Mapping[str, str] | None = None,
    ):
        """Claims the folder: creates it, or resumes the unfinished run in it if that is the same run.

        Args:
          path: absent, an empty folder, or the unfinished output of this very run.
          model_config: a family's config (LlamaConfig, say), or a Model.
          run_config: the settings of the run, plain values as `CompressConfig.to_dict()` gives them.
          fingerprint: changes with everything that decides the result and is not in the configs.
          inputs: {what the fingerprint is made of: digest or value}, by which a refusal names what differs.

        Raises:
          AlreadyFinished: this very run is finished there.
          InputError: the folder holds anything else, is in use by another process, or cannot be written to.
          RunError: the disk is full.
        """
        self._model = build_model(model_config)
        self._identity = Identity(
            fingerprint=fingerprint,
            inputs=dict(inputs or {}),
            model_config=json_files.plain(model_config_to_dict(self._model.config), "model_config"),
            run_config=json_files.plain(run_config, "run_config"),
        )
        self._shapes = inventory.model_shapes(self._model)
        self._items = (*self._shapes, TOKENIZER, CARRIED)
        self.path = Path(path)
        self._folder = RunFolder(self.path, self._identity)
        try:
            self.resumed = self._folder.resumed
            self.work_path = run_work_path(self.path)
            with atomic.writing(self.path):
                self.work_path.mkdir(exist_ok=True)
                self._parts = self._find_finished()
        except BaseException:
            self._folder.release()
            raise

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back, leaving what is whole for another process to resume; harmless after `finish`."""
        try:
            if self._folder.is_claimed:
                blocks = self.path / BLOCKS
                if blocks.is_dir() and not any(blocks.iterdir()):
                    blocks.rmdir()
                self._folder.abandon_if_empty()
        finally:
            self._folder.release()

    @property
    def finished_blocks(self) -> int:
        """How many leading blocks are whole; the next `store_block` is for the block of that number."""
        return len(self._parts.keys() - {REST, TOKENIZER, CARRIED})

    @property
    def outer_finished(self) -> bool:
        """Whether the parameters outside the blocks are whole."""
        return REST in self._parts

    def store_block(self, i: int, tree: Params) -> None:
        """Stores block i, which must be number `finished_blocks`; when this returns, it is safe on the disk.

        Args:
          i: the block.
          tree: its parameters by block-relative paths, dense arrays or CodebookArrays.

        Raises:
          InputError: not the next block, or parameters that are not those of the model.
          RunError: the disk is full or fails; what was whole stays whole.
        """
        if i != self.finished_blocks or i >= self._model.num_blocks:
            raise InputError(
                f"{self.path}: block {i} cannot be stored; {self.finished_blocks} of {self._model.num_blocks} are"
            )
        self._store_parameters(block_folder(i), tree)

    def store_outer(self, tree: Params) -> None:
        """Stores the parameters outside the blocks, by full paths; keeps them if an earlier process stored them.

        Raises:
          InputError: parameters that are not those of the model.
          RunError: the disk is full or fails.
        """
        if not self.outer_finished:
            self._store_parameters(REST, tree)

    def store_tokenizer(self, source: str | Path | Callable[[Path], Any]) -> None:
        """Carries a tokenizer along; keeps it if an earlier process stored it.

        Args:
          source: a folder, of which the TOKENIZER_FILES that are there are copied as they are; or a function that
            writes files into the folder it is given, such as a tokenizer's `save_pretrained`.

        Raises:
          InputError: no tokenizer file is there.
          RunError: the disk is full or fails.
        """

        def copy(folder: Path) -> None:
            if callable(source):
                source(folder)
            else:
                for name in TOKENIZER_FILES:
                    if (Path(source) / name).is_file():
                        shutil.copyfile(Path(source) / name, folder / name)
            if not any(folder.iterdir()):
                raise InputError(f"{source}: holds no tokenizer file such as {TOKENIZER_FILES[0]}")

        self._store_files(TOKENIZER, copy)

    def store_carried(self, write: Callable[[Path], Any]) -> None:
        """Carries along what is around a text model; keeps it if an earlier process stored it.

        Args:
          write: writes its files into the empty folder that it is given (`cluscomp_jax.io.hf.carried.Carried.write`).

        Raises:
          InputError: whatever `write` raises.
          RunError: the disk is full or fails.
        """
        self._store_files(CARRIED, write)

    def load_block(self, i: int) -> Params:
        """Returns finished block i as it will load from the checkpoint, its files verified.

        Raises:
          InputError: block i is not finished, or was damaged since.
        """
        folder = block_folder(i)
        if folder not in self._parts:
            raise InputError(f"{self.path}: block {i} is not finished; {self.finished_blocks} are")
        return self._load(folder)

    def load_outer(self) -> Params:
        """Returns the parameters outside the blocks as they will load from the checkpoint, their files verified.

        Raises:
          InputError: they are not stored, or were damaged since.
        """
        if not self.outer_finished:
            raise InputError(f"{self.path}: the parameters outside the blocks are not stored")
        return self._load(REST)

    def finish(self, *, provenance: Mapping[str, Any], metrics: Mapping[str, Any]) -> Manifest:
        """Writes the manifest, with which the folder becomes a checkpoint, removes work/, and returns the manifest.

        Args:
          provenance: where the inputs came from, versions, times; any JSON.
          metrics: what was measured, errors per matrix say; any JSON. Numbers that are not finite become null.

        Raises:
          InputError: an item is missing or was changed since, or a value that JSON cannot hold.
          RunError: the disk is full or fails; the same run may call `finish` again.
        """
        if missing := [folder for folder in self._shapes if folder not in self._parts]:
            raise InputError(f"{self.path}: cannot be finished, {missing[0]} has not been stored")
        manifest = Manifest(
            package_version=package_version(),
            fingerprint=self._identity.fingerprint,
            model_config=self._identity.model_config,
            run_config=self._identity.run_config,
            contents=Contents(
                {path: entry for part in self._parts.values() for path, entry in part.entries.items()},
                {name: entry for part in self._parts.values() for name, entry in part.files.items()},
            ),
            provenance=json_files.plain(provenance, "provenance"),
            metrics=json_files.plain(metrics, "metrics"),
        )
        inventory.check_files(self.path, manifest.contents)
        with atomic.writing(self.path):
            self._folder.complete(manifest)
        self._folder.release()
        return manifest

    def _load(self, folder: str) -> Params:
        prefix = inventory.item_prefix(self._model, folder)
        return inventory.load_item(self.path, folder, self._parts[folder], prefix=prefix)

    def _aside(self, folder: str) -> Path:
        """Returns the place where an item is written, absent, its parent there."""
        aside = self._folder.work / "items" / folder
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        return aside

    def _record(self, folder: str) -> Path:
        return self._folder.work / "records" / f"{folder.replace('/', '-')}.json"

    def _store_files(self, folder: str, write: Callable[[Path], Any]) -> None:
        if folder in self._parts:
            return
        with atomic.writing(self.path):
            aside = self._aside(folder)
            aside.mkdir(parents=True)
            write(aside)
            self._publish(folder, {})

    def _store_parameters(self, folder: str, tree: Params) -> None:
        prefix = inventory.item_prefix(self._model, folder)
        entries: dict[str, Entry] = {}
        arrays: dict[str, Any] = {}
        flat = trees.flatten(tree)
        check_shared(flat, self.path)
        for path, leaf in flat.items():
            entries[prefix + path], encoded = encode(path, leaf)
            arrays.update(encoded)
        inventory.check_shapes(Contents(entries, {}), self._shapes[folder], self.path)
        with atomic.writing(self.path):
            aside = self._aside(folder)
            atomic.require_space(self.path, orbax_items.disk_bytes(arrays))
            orbax_items.write_item(aside, arrays)
            self._publish(folder, entries)

    def _publish(self, folder: str, entries: dict[str, Entry]) -> None:
        """Syncs the item in work/, records it, and renames it to its place."""
        aside, final, record = self._folder.work / "items" / folder, self.path / folder, self._record(folder)
        atomic.sync_tree(aside)
        part = Contents(entries, inventory.list_files(aside, folder))
        record.parent.mkdir(parents=True, exist_ok=True)
        self._folder.write(record, json_files.dumps(part.to_dict()))
        final.parent.mkdir(exist_ok=True)
        atomic.publish(aside, final)
        atomic.sync(self.path)
        self._parts[folder] = part

    def _find_finished(self) -> dict[str, Contents]:
        """Returns {item folder: contents} of the items at their places, each compared with its record and the model."""
        folders = [folder for folder in self._items if (self.path / folder).is_dir()]
        blocks = [folder for folder in folders if folder not in (REST, TOKENIZER, CARRIED)]
        if blocks != [block_folder(i) for i in range(len(blocks))]:
            raise InputError(f"{self.path}: of blocks 0 to {len(blocks) - 1} some are missing; choose another folder")
        parts: dict[str, Contents] = {}
        for folder in folders:
            record = self._record(folder)
            parts[folder] = parse_contents(json_files.read_object(record), record)
            inventory.check_shapes(parts[folder], self._shapes.get(folder, {}), record)
        files = {name: entry for part in parts.values() for name, entry in part.files.items()}
        inventory.check_files(self.path, Contents({}, files))
        return parts
