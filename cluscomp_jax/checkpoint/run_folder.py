"""The output folder of a run: whose it is, the lock on it, and its turn from unfinished to finished.

    OUT/run.json       fingerprint and configs of the unfinished run; gone when it is finished
    OUT/work/          the lock, what is being written, and whatever else the run needs until it ends
    OUT/manifest.json  appears last and whole: with it the folder is finished

Knows nothing of what the run stores between these.
"""

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, read_manifest
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.runtime import atomic, json_files

RUN_NAME = "run.json"
WORK_NAME = "work"
_LOCK_NAME = "lock"
_SHOWN_DIFFERENCES = 5
_DIGEST = re.compile("[0-9a-f]{64}")


class AlreadyFinished(InputError):
    """The folder holds the finished checkpoint of this very run."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What makes two runs the same: the fingerprint of their inputs, and both configs as JSON values.

    Attributes:
      inputs: {what the fingerprint is made of: digest or value}, for naming what differs; {} where not recorded.
    """

    fingerprint: str
    model_config: dict[str, Any]
    run_config: dict[str, Any]
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)


class RunFolder:
    """A folder claimed for one run, by a lock that ends with the process or with `release`.

    Attributes:
      path: the folder.
      work: a folder in it that is removed when the run is finished.
      resumed: whether an earlier process had begun this run.
    """

    def __init__(self, path: Path, identity: Identity):
        """Claims `path`, which is created where it is absent.

        Raises:
          AlreadyFinished: this run is finished there.
          InputError: the folder is another run's or nobody's, is in use, or cannot be written to.
          RunError: the disk is full.
        """
        self.path = path
        self.work = path / WORK_NAME
        self._made = [folder for folder in (path, *path.parents) if not _exists(folder)]
        self._lock: int | None = None
        try:
            while self._lock is None:  # again if the process that had the lock finished and removed it
                _refuse_others(path, identity, locked=False)
                self.work.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(self.work / _LOCK_NAME, path)
            try:
                _refuse_others(path, identity, locked=True)  # of what was done between the look and the lock
                self.resumed = _exists(path / RUN_NAME)
                if not self.resumed:
                    _clear(self.work)
                    fields = {"format_version": FORMAT_VERSION, **dataclasses.asdict(identity)}
                    self.write(path / RUN_NAME, json_files.dumps(fields))
            except BaseException:
                self.release()
                raise
        except OSError as error:
            if atomic.is_full(error):
                raise RunError(f"{path}: the disk is full; make room") from error
            raise InputError(
                f"{path}: cannot be written to: {error.strerror or error}; choose another folder"
            ) from error

    @property
    def is_claimed(self) -> bool:
        """Whether the lock is held."""
        return self._lock is not None

    def write(self, path: Path, text: str) -> None:
        """Writes a text file within the folder, whole or not at all."""
        atomic.write_text(path, text, aside=self.work / "text")

    def complete(self, manifest: Manifest) -> None:
        """Writes the manifest, with which the folder is finished, and removes run.json and work/ with its lock."""
        self.write(self.path / MANIFEST_NAME, json_files.dumps(manifest.to_dict()))
        _remove_leftovers(self.path)

    def abandon_if_empty(self) -> None:
        """Undoes the claim if nothing but run.json and work/ is there; removes the folders too that the claim made.

        Where anything else is there, a log say, the folder must stay this run's, or the same run could not resume.
        """
        if {entry.name for entry in self.path.iterdir()} <= {RUN_NAME, WORK_NAME}:
            _remove_leftovers(self.path)
            with contextlib.suppress(OSError):  # not empty: another run has begun to use a parent
                for folder in self._made:
                    folder.rmdir()

    def release(self) -> None:
        """Gives the lock back; the folder stays as it is."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _lock(lock: Path, folder: Path) -> int | None:
    """Returns the descriptor that holds the lock, None if the file or its folder went before it was held."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = _is_file_of(descriptor, lock)  # not of one that was removed: another process may hold its successor
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            message = f"{folder}: another process is writing there; wait for it, or choose another folder"
            raise InputError(message) from error
        raise
    if held:
        return descriptor
    os.close(descriptor)
    return None


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _clear(work: Path) -> None:
    """Empties work/ except for the lock, by which a claim recognises its own folder."""
    for entry in work.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK_NAME:
            entry.unlink()


def _remove_leftovers(folder: Path) -> None:
    (folder / RUN_NAME).unlink(missing_ok=True)
    _clear(folder / WORK_NAME)
    shutil.rmtree(folder / WORK_NAME)
    atomic.sync(folder)


def _refuse_others(folder: Path, identity: Identity, *, locked: bool) -> None:
    """Returns if the folder may be claimed: absent, empty, or the unfinished output of the same run.

    Args:
      folder: the output folder.
      identity: of the run that claims the folder.
      locked: whether this process holds the lock on it.
    """
    if not _exists(folder):
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; choose another name")
    if _exists(folder / MANIFEST_NAME):
        _refuse_finished(folder, identity, locked=locked)
    elif _exists(folder / RUN_NAME):
        differences = _differences(_read_identity(folder / RUN_NAME), identity)
        if differences:
            raise InputError(f"{folder}: holds another unfinished run ({differences}); choose another folder")
    elif not _is_untouched(folder):
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:3])
        raise InputError(f"{folder}: is not empty and not an unfinished run (it holds {names}); choose another folder")


def _refuse_finished(folder: Path, identity: Identity, *, locked: bool) -> None:
    manifest = read_manifest(folder / MANIFEST_NAME)
    there = Identity(manifest.fingerprint, manifest.model_config, manifest.run_config)
    differences = _differences(there, identity)
    if differences:
        raise InputError(
            f"{folder}: holds the finished checkpoint of another run ({differences}); choose another folder"
        )
    if locked:
        _remove_leftovers(folder)
    elif _exists(folder / WORK_NAME):  # killed between the manifest and the removal
        lock = _lock(folder / WORK_NAME / _LOCK_NAME, folder)
        if lock is not None:  # else another process has just removed them
            _remove_leftovers(folder)
            os.close(lock)
    raise AlreadyFinished(f"{folder}: this very run is already finished there; use it, or choose another folder")


def _is_untouched(folder: Path) -> bool:
    """Whether the folder has nothing but what a claim leaves if it is killed before run.json or after it."""
    names = {entry.name for entry in folder.iterdir()}
    if names != {WORK_NAME}:
        return not names
    inside = {entry.name for entry in (folder / WORK_NAME).iterdir()}
    return not inside or _LOCK_NAME in inside


def _read_identity(path: Path) -> Identity:
    fields = json_files.read_object(path)
    if fields.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version is {fields.get('format_version')!r}; this cluscomp_jax writes {FORMAT_VERSION}"
        )
    fingerprint, model_config, run_config, inputs = (fields.get(f.name) for f in dataclasses.fields(Identity))
    if not (
        isinstance(fingerprint, str)
        and isinstance(model_config, dict)
        and isinstance(run_config, dict)
        and isinstance(inputs, dict)
    ):
        raise InputError(f"{path}: lacks the fingerprint or the configs of its run; choose another folder")
    return Identity(fingerprint, model_config, run_config, {name: str(value) for name, value in inputs.items()})


def _differences(there: Identity, now: Identity) -> str:
    """Returns a description of how two runs differ, "" where they do not."""
    old = {**_leaves(there.model_config, "model."), **_leaves(there.run_config, "")}
    new = {**_leaves(now.model_config, "model."), **_leaves(now.run_config, "")}
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        shown = [f"{key} is {old.get(key)!r} there, {new.get(key)!r} here" for key in keys[:_SHOWN_DIFFERENCES]]
        more = f", and {len(keys) - _SHOWN_DIFFERENCES} more" if len(keys) > _SHOWN_DIFFERENCES else ""
        return "; ".join(shown) + more
    if there.fingerprint == now.fingerprint:
        return ""
    if not (there.inputs and now.inputs):
        return "same settings, but other weights, data, versions or device"
    names = [name for name in {**there.inputs, **now.inputs} if there.inputs.get(name) != now.inputs.get(name)]
    return "same settings, but " + ", ".join(_in_words(name, there.inputs, now.inputs) for name in names)


def _in_words(name: str, there: Mapping[str, str], now: Mapping[str, str]) -> str:
    old, new = there.get(name, "none"), now.get(name, "none")
    return f"other {name}" if _DIGEST.fullmatch(old) or _DIGEST.fullmatch(new) else f"{name} is {old} there, {new} here"


def _leaves(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = {str(i): item for i, item in enumerate(value)}  # rules, one by one
    if not isinstance(value, Mapping):
        return {name.removesuffix("."): value}
    return {key: leaf for part, item in value.items() for key, leaf in _leaves(item, f"{name}{part}.").items()}
