"""Wall time and peak memory by stage of a run; where the run owns its process, freed memory returned between stages."""

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluscomp_jax.runtime.host_memory import return_freed_memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PEAK_LOCK = threading.Lock()
_peak_of_past_stages = 0


class StageTimer:
    """Adds up wall seconds of every named stage and, in a process of the run's own, keeps its largest resident set.

    On Linux the peak is that of the stage itself; elsewhere that of the process so far.

    Args:
      owns_process: whether the process does nothing but this run, as under the command line. Only then may a stage
        reset the operating system's peak of the process, to measure its own, and `release` call the C allocator.
    """

    def __init__(self, *, owns_process: bool = False) -> None:
        self._owns_process = owns_process
        self._stages: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the block towards stage `name`; stages do not nest."""
        began = time.monotonic()
        if self._owns_process:
            _reset_peak()
        try:
            yield
        finally:
            self._add(name, time.monotonic() - began)

    @contextmanager
    def concurrent(self, name: str) -> Iterator[None]:
        """Counts the block, in a thread of its own, towards stage `name`, which runs at the same time as another stage.

        Its peak memory is that since the other stage began.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            self._add(name, time.monotonic() - began)

    def release(self) -> None:
        """Gives freed memory back to the operating system (`return_freed_memory`), if the process is the run's own."""
        if self._owns_process:
            return_freed_memory()

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            stage = self._stages.setdefault(name, {"seconds": 0.0, "peak_rss_bytes": None})
            stage["seconds"] += seconds
            if self._owns_process:
                stage["peak_rss_bytes"] = max(stage["peak_rss_bytes"] or 0, _noted_peak())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns {stage: {"seconds": float, "peak_rss_bytes": int or None}} in order of first use."""
        with self._lock:
            return {name: dict(stage) for name, stage in self._stages.items()}


def _reset_peak() -> None:
    """Resets the operating system's high-water mark (Linux only; where that is refused, the peak so far stays)."""
    _noted_peak()
    if _CLEAR_REFS.exists():
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return


def _noted_peak() -> int:
    """Returns `peak_rss_bytes()`, which no later reset can take out of the process's own peak."""
    global _peak_of_past_stages  # the mark belongs to the process, not to any one clock
    peak = peak_rss_bytes()
    with _PEAK_LOCK:
        _peak_of_past_stages = max(_peak_of_past_stages, peak)
    return peak


def process_peak_rss_bytes() -> int:
    """Returns the largest resident set, in bytes, of this process so far.

    Where a stage has begun, getrusage and `time -v` report less: only the peak since the last reset.
    """
    return max(_peak_of_past_stages, peak_rss_bytes())


def peak_rss_bytes() -> int:
    """Returns the largest resident set, in bytes, of this process since the last stage began."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
