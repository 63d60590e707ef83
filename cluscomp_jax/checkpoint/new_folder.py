"""A folder that appears whole or not at all: written next to its final path, and renamed to it at the end.

For what is made in one go. Knows nothing of what the folder holds; `run_folder` is for work that resumes.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cluscomp_jax.checkpoint.manifest import MANIFEST_NAME, TREE_NAME
from cluscomp_jax.checkpoint.run_folder import RUN_NAME
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.runtime import atomic

_OF_A_CHECKPOINT = (MANIFEST_NAME, RUN_NAME, TREE_NAME)


def require_free(final: Path) -> None:
    """Raises InputError unless `final` is absent or an empty folder, in a folder that is no part of a checkpoint."""
    inside = next((p for p in final.absolute().parents if any((p / name).exists() for name in _OF_A_CHECKPOINT)), None)
    if inside is not None:
        raise InputError(
            f"{final}: is inside the checkpoint {inside}, which takes no other files; choose another folder"
        )
    if os.path.lexists(final):
        if not final.is_dir():
            raise InputError(f"{final}: is not a folder; choose another name")
        if held := sorted(entry.name for entry in final.iterdir()):
            raise InputError(f"{final}: is not empty (it holds {', '.join(held[:3])}); choose another folder")
    elif not final.absolute().parent.is_dir():
        raise InputError(f"{final}: the folder {final.absolute().parent} does not exist; make it first")


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `final` when the block ends well, and is removed when it does not.

    A process that is killed leaves ".NAME.partial" next to `final`; the next call for the same path removes it.

    Args:
      final: absent, or an empty folder.

    Raises:
      InputError: `final` is taken or the working folder, cannot be written to, or is being written by another process.
      RunError: the disk is full or fails.
    """
    require_free(final)
    final = final.resolve()
    if Path.cwd().is_relative_to(final):
        raise InputError(f"{final}: is the folder you are in, which would be replaced; name a folder inside it")
    aside = final.parent / f".{final.name}.partial"
    try:
        lock = _claim(aside, final)
    except OSError as error:
        raise InputError(f"{final}: cannot be written to: {error.strerror or error}; choose another folder") from error
    try:
        yield aside
        atomic.sync_tree(aside)
        require_free(final)
        atomic.publish(aside, final)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, InputError | RunError):
            raise
        if atomic.is_full(error):
            raise RunError(f"{final}: the disk is full; nothing is kept, make room and repeat the command") from error
        if reason := atomic.failed_write(error):
            raise RunError(f"{final}: writing failed: {reason}; nothing is kept") from error
        raise
    finally:
        os.close(lock)


def _claim(aside: Path, final: Path) -> int:
    """Returns a descriptor that locks `aside`, a new and empty folder."""
    aside.mkdir(exist_ok=True)
    lock = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"{final}: another process is writing there; wait for it, or choose another folder") from None
    for entry in aside.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return lock
