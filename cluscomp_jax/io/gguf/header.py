"""The counts of a GGUF header, read before the `gguf` library makes objects of what they count.

Knows how keys and values are laid out in a file, not what they mean. The library keeps 200 to 350 bytes and takes
microseconds for every element of an array, whatever its type, so that 20 MB of a file become 4.4 GiB.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from cluscomp_jax.errors import InputError

MOST_ELEMENTS = 3_000_000
"""Elements of all arrays together; a vocabulary of 262,144 tokens with scores, types and merges has 1.3 million."""
MOST_ENTRIES = 100_000
"""Keys, and tensors; the largest models have some thousands of tensors."""

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def check_counts(path: Path) -> None:
    """Returns if a GGUF header, version 2 or 3 in this byte order, counts no more than the limits above.

    Reads lengths alone, and skips what they count. A file that is no such header, or ends within it, is left to the
    library, which refuses it.

    Raises:
      InputError: more keys, tensors or elements of arrays, an array of arrays, which no model has, or an unknown type.
    """
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Walk(path, data).check()
            except struct.error:  # the file ends
                return


class _Walk:
    """A position in a header."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at, self._elements = path, data, 0, 0

    def check(self) -> None:
        magic, version, tensors, keys = self._take("<4sIQQ")
        if magic != _MAGIC or version not in (2, 3):
            return
        for count, what in ((keys, "keys"), (tensors, "tensors")):
            if count > MOST_ENTRIES:
                raise self._refused(f"counts {count:,} {what}; at most {MOST_ENTRIES:,} are read")
        for _ in range(keys):
            (length,) = self._take("<Q")
            name = bytes(self._data[self._at : self._at + min(length, 60)]).decode(errors="replace")
            self._skip(length)
            (kind,) = self._take("<I")
            if kind == _ARRAY:
                self._array(name)
            else:
                self._values(kind, 1)

    def _array(self, name: str) -> None:
        kind, count = self._take("<IQ")
        self._elements += count
        if self._elements > MOST_ELEMENTS:
            raise self._refused(
                f"has arrays of {self._elements:,} elements up to {name!r}, which has {count:,}; "
                f"at most {MOST_ELEMENTS:,} are read"
            )
        if kind == _ARRAY:
            raise self._refused(f"has arrays of arrays in {name!r}; arrays of numbers and of strings are read")
        self._values(kind, count)

    def _values(self, kind: int, count: int) -> None:
        if kind == _STRING:
            for _ in range(count):
                (length,) = self._take("<Q")
                self._skip(length)
        elif kind in _SCALAR_BYTES:
            self._skip(count * _SCALAR_BYTES[kind])
        else:
            raise self._refused(f"has a value of type {kind}; types 0 to 12 are known")

    def _refused(self, reason: str) -> InputError:
        return InputError(f"{self._path}: the GGUF header {reason}; use another file of the model")

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise struct.error("the file ends")
