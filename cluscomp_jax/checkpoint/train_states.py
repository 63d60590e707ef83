"""States of a training run on disk, through orbax: the newest few, each whole or not there. Knows no training."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from cluscomp_jax.checkpoint.orbax_items import quiet
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime import atomic


class TrainStates:
    """A folder of states, each of a step, with the records that a run had made by then.

    Saving runs in the background of the next steps. Use as a context manager, which exits after the last save.
    """

    def __init__(self, folder: Path, *, keep: int, fingerprint: str):
        """Opens a folder, which is made where it is absent.

        Args:
          folder: holds nothing but states.
          keep: number of the newest states that stay, >= 1.
          fingerprint: of the run; states of another are refused.
        """
        self._folder, self._fingerprint = folder.absolute(), fingerprint
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        with quiet(), atomic.writing(folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "TrainStates":
        return self

    def __exit__(self, *_: object) -> None:
        with quiet(), atomic.writing(self._folder):
            self._manager.close()

    def save(self, step: int, state: Any, records: list[dict[str, Any]]) -> None:
        """Saves a pytree of arrays and JSON records under a step that has not been saved; returns before it is done.

        Raises:
          RunError: the disk is full or fails, now or in the save before.
        """
        # Copies: while orbax still reads, the next step is given the buffers of the state and adds to the records.
        notes = {"fingerprint": self._fingerprint, "records": list(records)}
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)), notes=ocp.args.JsonSave(notes)
        )
        with quiet(), atomic.writing(self._folder):
            self._manager.save(step, args=parts)

    def newest(self, like: Any) -> tuple[Any, list[dict[str, Any]]] | None:
        """Returns (state, records) of the largest step, None where nothing was saved.

        Args:
          like: a pytree of the state's structure; its leaves have shapes and dtypes.

        Raises:
          InputError: the state is another run's, or damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = f"{self._folder / str(step)}"
        try:
            with quiet():
                notes = self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
                if notes["fingerprint"] != self._fingerprint:
                    raise InputError(f"{where}: is the state of another run; choose another folder")
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                parts = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                return self._manager.restore(step, args=parts)["state"], notes["records"]
        except InputError:
            raise
        except Exception as error:  # whatever orbax and TensorStore raise, the state is what is at fault
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{where}: this state cannot be read: {reason}; remove it to resume before it") from error
