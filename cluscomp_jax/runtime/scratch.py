"""Temporary folders where there is room for what is to lie in them. Knows nothing of what that is."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluscomp_jax.errors import InputError


@contextlib.contextmanager
def scratch_folder(parent: str | Path | None, num_bytes: int) -> Iterator[Path]:
    """Yields a new folder inside `parent`, which is removed at the end.

    Args:
      parent: an existing folder; None: the system's folder for temporary files, which TMPDIR names.
      num_bytes: what it will hold.

    Raises:
      InputError: no such folder, nothing can be written there, or fewer bytes are free.
    """
    place = scratch_parent(parent)
    require_room(place, num_bytes)
    try:
        made = tempfile.TemporaryDirectory(prefix="cluscomp-", dir=place)
    except OSError as error:
        raise InputError(f"{place}: cannot be written to: {error.strerror or error}; {_OTHERWISE}") from error
    with made as folder:
        yield Path(folder)


_OTHERWISE = "name another folder (work_dir, --work-dir, or TMPDIR)"


def scratch_parent(parent: str | Path | None) -> Path:
    """Returns the folder in which `scratch_folder` makes its own."""
    return Path(tempfile.gettempdir() if parent is None else parent)


def require_room(folder: Path, num_bytes: int, otherwise: str = _OTHERWISE) -> None:
    """Returns if `folder` is one whose disk has room for `num_bytes`.

    Args:
      folder: where they will be.
      num_bytes: how many.
      otherwise: what the person can do, for the error.

    Raises:
      InputError: it is no folder, or fewer bytes are free.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder for temporary files; make it first, or {otherwise}")
    usage = shutil.disk_usage(folder)
    free = usage.free
    if usage.total and free < num_bytes:  # some file systems in memory or over a network report no sizes
        raise InputError(
            f"{folder}: activations need {num_bytes / 2**20:,.1f} MiB for the time of the run, and "
            f"{free / 2**20:,.1f} MiB are free; make room, or {otherwise}"
        )
