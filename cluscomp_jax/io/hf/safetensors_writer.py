"""Safetensors written tensor by tensor into shards whose layout is known before the first one. Knows no models.

The safetensors library writes a file from a dict of all its tensors; here one tensor is in memory at a time.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from cluscomp_jax.io.hf.safetensors_file import STORED_DTYPES

_NAMES = {np.dtype(dtype): name for name, dtype in STORED_DTYPES.items()}
_COPY_BYTES = 1 << 25


class TensorSpec(NamedTuple):
    """The name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of its data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes model.safetensors, or its shards and their index, in the order of the specs. A context manager.

    Attributes:
      files: the names of the files, in order.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], *, shard_bytes: int):
        """Plans the files.

        Args:
          folder: exists.
          specs: every tensor, in the order in which `write` will get them; names are distinct.
          shard_bytes: most bytes of data in one file, unless a single tensor has more.
        """
        shards: list[list[TensorSpec]] = [[]]
        for spec in specs:
            if shards[-1] and sum(s.num_bytes for s in shards[-1]) + spec.num_bytes > shard_bytes:
                shards.append([])
            shards[-1].append(spec)
        self._folder, self._shards = folder, shards
        self._places = [(shard, spec) for shard, held in enumerate(shards) for spec in held]
        self._written = 0
        self._file: IO[bytes] | None = None
        self.files = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        )

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            assert self._written == len(self._places), "tensors were announced and not written"
            self._write_index()

    def write(self, array: np.ndarray) -> None:
        """Writes the next tensor, which must have the dtype and shape that were announced."""
        shard, spec = self._places[self._written]
        assert (array.dtype, array.shape) == (spec.dtype, spec.shape), (spec, array.dtype, array.shape)
        if self._file is None or spec is self._shards[shard][0]:
            self._begin(shard)
        assert self._file is not None
        array = np.atleast_1d(array)
        row_bytes = max(1, array.nbytes // max(1, len(array)))
        rows = max(1, _COPY_BYTES // row_bytes)
        for start in range(0, len(array), rows):
            self._file.write(np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8).data)
        self._written += 1

    def _begin(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in self._shards[shard]:
            begin, end = end, end + TensorSpec(name, dtype, shape).num_bytes
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self._folder / self.files[shard]).open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _write_index(self) -> None:
        if len(self.files) == 1:
            return
        total = sum(spec.num_bytes for _, spec in self._places)
        weight_map = {spec.name: self.files[shard] for shard, spec in self._places}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
