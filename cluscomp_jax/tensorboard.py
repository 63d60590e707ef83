"""Records of a run as TensorBoard's scalars. Knows nothing of what is being counted."""

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_jax.errors import InputError

FOLDER_NAME = "tensorboard"


class TensorBoardLog:
    """Writes every number of a record that has a `step` as the scalar "event/key" at that step and the record's time.

    The first record begins the folder anew, in place of what a killed process may have left.
    """

    def __init__(self, folder: Path):
        """Writes into `folder`, which is made with the first record and holds nothing else.

        Raises:
          InputError: the package tensorboardX is not installed.
        """
        try:
            self._package: Any = importlib.import_module("tensorboardX")
        except ImportError:
            raise InputError("--tensorboard needs tensorboardX: pip install 'cluscomp-jax[tensorboard]'") from None
        self._folder = folder
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record: plain JSON values, `event` and `time` among them."""
        if "step" not in record:
            return
        if self._writer is None:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._writer = self._package.SummaryWriter(str(self._folder))
        for key, value in record.items():
            if key not in ("event", "time", "step") and isinstance(value, int | float):
                self._writer.add_scalar(f"{record['event']}/{key}", value, record["step"], walltime=record["time"])

    def close(self) -> None:
        """Returns when everything is in the file."""
        if self._writer is not None:
            self._writer.close()
