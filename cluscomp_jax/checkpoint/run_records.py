"""The records of a run: of its finished blocks and of the measured sensitivities. Knows no models."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.core.sensitivities import Sensitivities
from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.reporter import Reporter


class RunRecords:
    """Records in a folder, which is made. A run that is resumed finds them there."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._blocks: dict[int, dict[str, Any]] = {}

    def store(self, i: int, record: dict[str, Any]) -> None:
        """Stores the record of block i, whole or not at all."""
        text = json.dumps(record)
        _write(self._path(i), text)
        self._blocks[i] = json.loads(text)

    def block(self, i: int) -> dict[str, Any]:
        """Returns the record of block i as it was stored, by this process or an earlier one."""
        if i not in self._blocks:
            self._blocks[i] = json.loads(self._path(i).read_text())
        return dict(self._blocks[i])

    def report(self, i: int, reporter: Reporter) -> None:
        """Gives the reporter the record of block i, with the time at which it was stored."""
        reporter.record("block", time=self._path(i).stat().st_mtime, **self.block(i))

    def sensitivities(self, measure: Callable[[], Sensitivities]) -> Sensitivities:
        """Returns the sensitivities, measured and stored if no earlier process has.

        The JSON file has those of the kernels and how many outputs each has. The arrays of the outputs, which may be
        millions of numbers, are one after the other in a file that is written before it.
        """
        path, array_file = self._folder / "sensitivities.json", self._folder / "sensitivities.npy"
        if not path.exists():
            kernels, outputs = measure()
            stored = io.BytesIO()
            np.save(stored, np.concatenate([np.zeros(0, np.float32), *outputs.values()]), allow_pickle=False)
            with atomic.writing(array_file):
                atomic.write_bytes(array_file, stored.getvalue(), aside=array_file.with_suffix(".tmp"))
            counts = {name: len(array) for name, array in outputs.items()}
            _write(path, json.dumps({"kernels": kernels, "outputs": counts}, indent=1))
        found = json.loads(path.read_text())
        counts = found["outputs"]
        arrays = np.split(np.load(array_file, allow_pickle=False), np.cumsum(list(counts.values()))[:-1])
        return Sensitivities(found["kernels"], dict(zip(counts, arrays, strict=True)))

    def _path(self, i: int) -> Path:
        return self._folder / f"{i:05d}.json"


def _write(path: Path, text: str) -> None:
    with atomic.writing(path):
        atomic.write_text(path, text, aside=path.with_suffix(".tmp"))
