"""A reader of safetensors files: header, checks, one tensor at a time. Knows no models.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
`safetensors.safe_open` is not used because it maps the file (measured with 0.8.0): a file that is cut short after it
was opened ends the process by SIGBUS, and the pages read count as resident memory. Here such a file is an InputError.
Nor does `framework="np"` read float8, or name the tensor at which a file is cut short.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime.lfs_pointer import refuse_lfs_pointer

_MAX_HEADER_BYTES = 100_000_000  # the bound of the format's own reader
_PIECE = 2**24
"""Bytes that are read at one time, but one row at least."""
STORED_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""{dtype as the format names it: of NumPy}."""


class Entry(NamedTuple):
    """One tensor of a file. Invariant: offset + dtype.itemsize * prod(shape) <= size of the file when it was opened."""

    path: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def rows(self, where: slice) -> "Entry":
        """Returns the entry of some rows, from `where.start` to `where.stop`, of the tensor."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._replace(
            shape=(where.stop - where.start, *self.shape[1:]), offset=self.offset + where.start * width
        )


def read_header(path: Path) -> dict[str, Entry]:
    """Returns {name: entry} of a safetensors file, every size and offset compared with the file's own size.

    A tensor of two names is stored once; `safetensors.torch.save_model` notes the other name in the header's metadata,
    {name left out: name stored}, and it is found by both.

    Raises:
      InputError: no such file, or it is truncated or damaged; the line says where.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise InputError(f"{path} is no whole safetensors file: {size} bytes, a header of {length} is announced")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no safetensors file: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} is no safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, data_start=8 + length, size=size) for name, fields in header.items()}
    for other, name in (metadata if isinstance(metadata, dict) else {}).items():
        if isinstance(name, str) and name in header:
            entries.setdefault(other, entries[name])
    return entries


def read_tensor(entry: Entry) -> np.ndarray:
    """Returns the tensor, in its stored dtype and shape.

    Raises:
      InputError: the file has become shorter since its header was read.
    """
    array = np.empty(entry.shape, entry.dtype)
    for where, piece in read_pieces(entry):
        array[where] = piece
    return array


def read_pieces(entry: Entry) -> Iterator[tuple[slice | EllipsisType, np.ndarray]]:
    """Yields (where along the first axis, the values there) of a tensor, some megabytes at a time, in order.

    Raises:
      InputError: the file has become shorter since its header was read.
    """
    total, height = math.prod(entry.shape), entry.shape[0] if entry.shape else 1
    width = math.prod(entry.shape[1:])
    rows = max(1, _PIECE // max(1, width * entry.dtype.itemsize))
    for first in range(0, height, rows):
        taken = min(rows, height - first)
        offset = entry.offset + first * width * entry.dtype.itemsize
        values = np.fromfile(entry.path, entry.dtype, count=taken * width, offset=offset)
        if values.size != taken * width:
            there = first * width + values.size
            raise InputError(f"{entry.path}: tensor {entry.name} ends after {there} of {total} values; fetch it again")
        if entry.shape:
            yield slice(first, first + taken), values.reshape(taken, *entry.shape[1:])
        else:
            yield ..., values.reshape(())


def _entry(path: Path, name: str, fields: Any, *, data_start: int, size: int) -> Entry:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: tensor {name} has no dtype, shape and data_offsets in the header") from None
    if not isinstance(dtype_name, str) or dtype_name not in STORED_DTYPES:
        raise InputError(f"{path}: tensor {name} has dtype {dtype_name!r}; known: {', '.join(STORED_DTYPES)}")
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))):
        raise InputError(f"{path}: tensor {name} has shape {shape} at {begin} … {end}; integers from 0 are expected")
    dtype = np.dtype(STORED_DTYPES[dtype_name])
    if end - begin != dtype.itemsize * math.prod(shape):
        raise InputError(f"{path}: tensor {name} {dtype_name} {shape} does not fill its bytes {begin} … {end}")
    if data_start + end > size:
        raise InputError(f"{path} is truncated: tensor {name} ends at byte {data_start + end}, the file has {size}")
    return Entry(path, name, dtype, tuple(shape), data_start + begin)
