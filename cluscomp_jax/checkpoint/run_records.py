"""The records of a run's finished blocks and measured sensitivities, one JSON file each. Knows no models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    def sensitivities(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Returns {path: sensitivity}, measured and stored if no earlier process has."""
        path = self._folder / "sensitivities.json"
        if not path.exists():
            _write(path, json.dumps(measure(), indent=1))
        found: dict[str, float] = json.loads(path.read_text())
        return found

    def _path(self, i: int) -> Path:
        return self._folder / f"{i:05d}.json"


def _write(path: Path, text: str) -> None:
    with atomic.writing(path):
        atomic.write_text(path, text, aside=path.with_suffix(".tmp"))
