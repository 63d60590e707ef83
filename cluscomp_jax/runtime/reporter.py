"""Progress bars with rate and time left, and logs of records. Knows nothing of what is being counted."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluscomp_jax.errors import RunError
from cluscomp_jax.runtime.extras import needed_for

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 30.0
"""Where standard error is a file, a line of progress is written at most this often."""


class Reporter(Protocol):
    """What long work reports to the outside."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage of `total` steps begins; it replaces the one before."""
        ...

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many more steps of the stage are done; `note` says what the last one was."""
        ...

    def record(self, event: str, **fields: Any) -> None:
        """One finished measurement, as plain JSON values; `time` among them replaces the time of the call.

        A run that is resumed begins by recording again what it had finished.
        """
        ...

    def warn(self, text: str) -> None:
        """One line that a person should read, though the work goes on."""
        ...


class SilentReporter:
    """A Reporter that says nothing; the default of the library functions."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Says nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Says nothing."""

    def record(self, event: str, **fields: Any) -> None:
        """Says nothing."""

    def warn(self, text: str) -> None:
        """Says nothing."""


class RecordLog(Protocol):
    """Where records go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record: plain JSON values, `event` and `time` among them."""
        ...

    def close(self) -> None:
        """Returns when all records are where they go."""
        ...


class JsonLinesLog:
    """A file with one line of strict JSON for each record.

    The first begins a new file, in place of one that a killed process may have left incomplete.
    """

    def __init__(self, path: Path):
        self._path = path
        self._mode = "w"

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one line."""
        with self._path.open(self._mode, encoding="utf-8") as file:
            self._mode = "a"
            file.write(to_json(record) + "\n")

    def close(self) -> None:
        """Returns at once: no file is open between records."""


class ConsoleReporter:
    """A Reporter that shows a bar, or lines where there is no terminal, and passes records to logs.

    Made by `console_reporter`.
    """

    def __init__(self, progress: "Progress", logs: Sequence[RecordLog]):
        self._progress = progress
        self._logs = logs
        self._task: TaskID | None = None
        self._stage, self._unit = "", ""
        self._done, self._total = 0, 0
        self._began = 0.0
        self._last_line = time.monotonic()

    def start(self, stage: str, total: int, unit: str) -> None:
        """Shows a new bar in place of the one before."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(stage, total=total, rate="", note="")
        self._stage, self._unit, self._total, self._done = stage, unit, total, 0
        self._began = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Moves the bar."""
        if self._task is None:
            return
        now = time.monotonic()
        self._done += steps
        rate = self._done / max(now - self._began, 1e-9)
        shown = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2f} {self._unit}/s"
        self._progress.update(self._task, advance=steps, rate=shown, note=note)
        if not self._progress.console.is_terminal and now - self._last_line >= _LINE_EVERY_S:
            left = (self._total - self._done) / rate
            line = f"{self._stage}: {self._done}/{self._total} {self._unit}, {shown}, {left:.0f} s left"
            print(line, file=self._progress.console.file, flush=True)
            self._last_line = now

    def record(self, event: str, **fields: Any) -> None:
        """Adds the record to every log."""
        record = {"event": event, "time": time.time(), **fields}
        for log in self._logs:
            log.write(record)

    def warn(self, text: str) -> None:
        """Prints the line on standard error, above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def console_reporter(*logs: RecordLog) -> Iterator[ConsoleReporter]:
    """Yields a ConsoleReporter whose bar is on standard error inside the block; then closes the logs."""
    with needed_for("a progress bar", "cli"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    # Older releases of rich end a bar that is not shown by an empty line.
    with progress if console.is_terminal else contextlib.nullcontext():
        try:
            yield ConsoleReporter(progress, logs)
        except BaseException:
            for log in logs:
                with contextlib.suppress(RunError):  # what ended the work counts, not what followed from it
                    log.close()
            raise
        for log in logs:
            log.close()


def to_json(fields: Mapping[str, Any]) -> str:
    """Returns one line of strict JSON; numbers that are not finite become null."""
    return json.dumps(_finite(fields), sort_keys=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
