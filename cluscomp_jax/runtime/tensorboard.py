"""Records of a run as TensorBoard's scalars. Knows nothing of what is being counted."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.extras import needed_for

FOLDER_NAME = "tensorboard"
_PREFIX = "events"


class TensorBoardLog:
    """Writes every number of a record that has a `step` as the scalar "event/key" at that step and the record's time.

    The first record begins a new file, in place of one that a killed process may have left; each is in the file when
    `write` returns. Written without tensorboardX's thread, which ends at a full disk while its callers wait for ever.
    """

    def __init__(self, folder: Path):
        """Writes into `folder`, which is made with the first record.

        Raises:
          InputError: the package tensorboardX is not installed.
        """
        with needed_for("--tensorboard", "tensorboard"):
            self._events: Any = importlib.import_module("tensorboardX.event_file_writer")
            self._summary: Any = importlib.import_module("tensorboardX.summary")
            self._proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._folder = folder
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record: plain JSON values, `event` and `time` among them.

        Raises:
          RunError: the folder cannot be written to.
        """
        if "step" not in record:
            return
        with atomic.writing(self._folder):
            if self._writer is None:
                remove_scalars(self._folder)
                self._folder.mkdir(parents=True, exist_ok=True)
                self._writer = self._events.EventsWriter(str(self._folder / _PREFIX))
            for key, value in record.items():
                if key not in ("event", "time", "step") and isinstance(value, int | float):
                    summary = self._summary.scalar(f"{record['event']}/{key}", value)
                    event = self._proto.Event(wall_time=record["time"], step=record["step"], summary=summary)
                    self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
          RunError: the folder cannot be written to.
        """
        if self._writer is not None:
            with atomic.writing(self._folder):
                self._writer.close()


def remove_scalars(folder: Path) -> None:
    """Removes the files that an earlier process left, no others, and the folder if nothing else is in it."""
    if folder.is_dir() and not folder.is_symlink():
        for file in folder.glob(f"{_PREFIX}.out.tfevents.*"):
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
