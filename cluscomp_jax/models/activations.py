"""Activation streams that live in memory-mapped files and pass through the device in batches.

Host and device hold a few batches at a time, whatever the size of the stream. Knows nothing of models.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np


class ActivationStore:
    """A file of activations [samples, length, d] in one dtype.

    The file is scratch: it is always a new one, and no later run reads it.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: Any):
        """Creates the file at its full size.

        Raises:
          OSError: the disk has no room for it.
        """
        self.shape = shape
        self.dtype = np.dtype(dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        size = int(np.prod(shape)) * self.dtype.itemsize
        try:
            with path.open("wb") as file:
                _reserve(file.fileno(), size)
        except OSError as error:
            path.unlink(missing_ok=True)
            reason = f"{error.strerror}: {size / 2**20:,.1f} MiB of activations are needed for the time of the run"
            raise OSError(error.errno, reason, str(path)) from error
        self._path = path
        # numpy cannot map bfloat16 by name; its bytes can be viewed as it.
        self._map = np.memmap(path, np.uint8, "r+", shape=(size,)).view(self.dtype).reshape(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, samples: slice | np.ndarray) -> np.ndarray:
        """Returns the samples [b, length, d]."""
        return np.asarray(self._map[samples])

    def write(self, samples: slice, values: np.ndarray | jax.Array) -> None:
        """Stores the samples, cast to the store's dtype."""
        self._map[samples] = np.asarray(values).astype(self.dtype)

    def batches(self, batch_size: int, stop: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields (positions, samples) in order; the last batch may be smaller."""
        stop = len(self) if stop is None else stop
        for begin in range(0, stop, batch_size):
            where = slice(begin, min(begin + batch_size, stop))
            yield where, self.read(where)

    def exchange(self, other: "ActivationStore") -> None:
        """Exchanges the contents of two stores of one shape and dtype, without a copy."""
        self._path, other._path = other._path, self._path
        self._map, other._map = other._map, self._map

    def delete(self) -> None:
        """Removes the file."""
        del self._map
        self._path.unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    """Gives the file its blocks now: a full disk is an error here, not a crash when a mapped page is written."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def run_through(
    function: Callable[[jax.Array], jax.Array],
    store: ActivationStore,
    into: ActivationStore,
    *,
    batch_size: int,
    dtype: Any,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
) -> None:
    """Writes function(batch as `dtype`) of every batch of `store` to the same place of `into` (may be `store`).

    The next batch is handed to the device, by `put`, before the last result is fetched.
    """
    pending: tuple[slice, jax.Array] | None = None
    for where, batch in store.batches(batch_size):
        result = function(put(batch).astype(dtype))
        if pending is not None:
            into.write(*pending)
        pending = where, result
    if pending is not None:
        into.write(*pending)
