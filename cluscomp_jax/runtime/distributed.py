"""Several processes that make one run, each with devices of its own: how they meet, and what the first alone decides.

Everything in between is JAX's. All processes run the same program on the same inputs; the first one writes.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from cluscomp_jax.errors import InputError, RunError

AUTO = "auto"


def join(coordinator: str | None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Meets the other processes of a run; must come before anything is computed. Does nothing without a coordinator.

    Args:
      coordinator: "HOST:PORT" of process 0, where it will listen; "auto": as the cluster says that started them (SLURM,
        Open MPI, Kubernetes, Cloud TPU; `jax.distributed.initialize`).
      num_processes: of the run, >= 1; None with "auto".
      process_id: of this one, from 0; None with "auto".

    Raises:
      InputError: numbers that are missing, superfluous or out of range.
    """
    given = {"--num-processes": num_processes, "--process-id": process_id}
    if coordinator is None or coordinator == AUTO:
        for flag, value in given.items():
            if value is not None:
                raise InputError(f"{flag} {value} has no effect without --coordinator HOST:PORT; add that")
        if coordinator == AUTO:
            jax.distributed.initialize()
        return
    if num_processes is None or process_id is None:
        missing = " and ".join(flag for flag, value in given.items() if value is None)
        raise InputError(f"--coordinator {coordinator} needs {missing}")
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process-id is {process_id}; with --num-processes {num_processes} it is 0 or more and less")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, or {AUTO!r}")
    jax.distributed.initialize(coordinator, num_processes, process_id)


def is_first() -> bool:
    """Returns whether this process writes the files of the run."""
    return bool(jax.process_index() == 0)


@contextlib.contextmanager
def decided_by_first() -> Iterator[None]:
    """Runs the block in every process; where it fails in the first, the others stop too.

    Raises:
      RunError: in the others.
    """
    done = False
    try:
        yield
        done = True
    finally:
        agreed = bool(multihost_utils.broadcast_one_to_all(np.array(done)))
        if done and not agreed:
            raise RunError("process 0 has stopped; its standard error says why")


def meet() -> None:
    """Returns once every process has come here."""
    multihost_utils.sync_global_devices("cluscomp")
