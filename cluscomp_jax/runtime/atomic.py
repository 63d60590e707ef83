"""Files and folders that appear whole or not at all, their checksums, and the errors of a disk. Knows no format."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cluscomp_jax.errors import InputError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TENSORSTORE_WRITES = "Error writing"
"""In the ValueError that TensorStore makes of an error of the operating system."""
_FULL_TEXTS = tuple(os.strerror(code) for code in _FULL)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until everything at and below a folder is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def publish(aside: Path, final: Path) -> None:
    """Renames a synced file or folder to where it is looked for; returns once the new name is on the disk."""
    os.replace(aside, final)
    sync(final.parent)


def write_text(path: Path, text: str, *, aside: Path) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode(), aside=aside)


def write_bytes(path: Path, content: bytes, *, aside: Path) -> None:
    """Writes a file whole or not at all; `aside` is a path on the same disk that may be overwritten.

    Where writing fails, nothing is left.
    """
    try:
        aside.write_bytes(content)
        sync(aside)
        publish(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Returns the "/"-joined paths, relative to `folder` and sorted, of all that is not a folder below it.

    A link is not followed, so a link to a folder counts as something that is not one.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in names + links]
    return sorted(found)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises the disk's own "No space left" at once if `num_bytes` more bytes do not fit on the disk of `folder`.

    A library that writes in threads of its own fails far less tidily half-way.
    """
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk is full; TensorStore says it only in the text of a ValueError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def failed_write(error: BaseException) -> str | None:
    """Returns what the operating system says of a failed write, None where the error is of another kind."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    return " ".join(str(error).split())[:160] if _TENSORSTORE_WRITES in str(error) else None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a disk's refusal to go on writing at `path` into a RunError; other errors pass through.

    Raises:
      RunError: the disk is full, or the operating system reports another error.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if is_full(error):
            raise RunError(f"{path}: the disk is full; make room") from error
        if reason := failed_write(error):
            raise RunError(f"{path}: writing failed: {reason}") from error
        raise
