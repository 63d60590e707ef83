"""Whether files are still what they were when they were opened, by size and modification time."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluscomp_jax.errors import InputError


class FileStamps:
    """Size and modification time of some files, as they were when this was made."""

    def __init__(self, files: Iterable[Path]):
        self._stamps = {path: _stamp(path) for path in files}

    def fingerprint(self) -> bytes:
        """Returns a line of name, size and modification time for each file, as they were, not as they are."""
        lines = (f"{path.name} {size} {changed}\n" for path, (size, changed) in self._stamps.items())
        return "".join(lines).encode()

    def require_unchanged(self) -> None:
        """Returns if the files are the same. Half of one model and half of another would load, and be wrong.

        Raises:
          InputError: a file has gone or was changed; it is named.
        """
        for path, stamp in self._stamps.items():
            if not path.is_file():
                raise InputError(f"{path} has gone since it was opened; put it back and give the same command again")
            if _stamp(path) != stamp:
                raise InputError(
                    f"{path} was changed since it was opened; fetch it again, or begin a new run with it as it is"
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Reads inside come from the files as they were opened, or `require_unchanged` raises, before or after them."""
        self.require_unchanged()
        try:
            yield
        except (InputError, OSError):
            self.require_unchanged()  # names the cause where a file that changed could not be read
            raise
        self.require_unchanged()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
