"""One orbax item: a nested dict of plain arrays in a folder, written and read quietly. Knows nothing of codebooks.

An item is a PyTree checkpoint of orbax in its zarr form, one uncompressed chunk per array. Every file but orbax's
time-stamped `_CHECKPOINT_METADATA` has the same name and bytes whenever the arrays are the same. Items of earlier
releases can be coded by zstd, and are read in the same way.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError

TIME_STAMPED = "_CHECKPOINT_METADATA"
"""The one file of an item that differs from run to run."""

_COMMIT_FILE = "commit_success.txt"
_PAGE = 4096


def _drop(record: logging.LogRecord) -> bool:
    return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Has orbax log nothing inside.

    It warns at every save in zarr form that OCDBT files are absent, and logs errors that it also raises.
    """
    logger = logging.getLogger("absl")
    logger.addFilter(_drop)
    try:
        yield
    finally:
        logger.removeFilter(_drop)


class _WaitingHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Reads NumPy arrays side by side, and raises what one of them raised only when all reads have ended.

    orbax's own handler raises at once and closes its event loop. TensorStore's threads, which still read the other
    arrays, then call into that closed loop and print a traceback each.
    """

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        """Returns the description of each array."""
        return await _each(super().metadata, infos)

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[Any]:
        """Returns each array."""
        return await _each(super().deserialize, infos, *([] if args is None else [args]))


async def _each(read: Callable[..., Awaitable[Sequence[Any]]], *columns: Sequence[Any]) -> list[Any]:
    """Returns what `read` gives for every row of `columns` alone, after the last has ended."""
    reads = [read(*([value] for value in row)) for row in zip(*columns, strict=True)]
    arrays: list[Any] = []
    for result in await asyncio.gather(*reads, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        arrays += result
    return arrays


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.PyTreeCheckpointer]:
    """Yields a checkpointer that logs nothing, and that of several processes concerns this one alone."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    with quiet():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=False,
            use_compression=False,  # of writing; an item that is read says itself how it is coded
            multiprocessing_options=alone,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, _WaitingHandler())),
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer


def disk_bytes(arrays: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """Returns about how much of a disk with 4 KiB pages an item of these arrays takes; rather more than less."""
    return 8 * _PAGE + sum(-(-array.nbytes // _PAGE) * _PAGE + 2 * _PAGE for array in arrays.values())


def write_item(folder: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes {path: array} as one item into a folder that does not exist yet, and returns when all is written.

    Args:
      folder: absent.
      arrays: {path: array}.

    Errors are orbax's own: a ValueError in whose text TensorStore quotes the system's, an OSError, or others.
    """
    with _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), trees.unflatten(arrays))
    # orbax writes the path it saved under, which is the writer's business, into a file that only has to exist.
    (folder / _COMMIT_FILE).write_text("Checkpoint commit was successful\n", encoding="utf-8")


def read_item(folder: Path, expected: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Returns {path: array} of an item that holds exactly the `expected` {path: (shape, dtype)}.

    The item's own description is compared before any array is allocated.

    Raises:
      InputError: the item holds something else, or orbax cannot read it.
    """
    with _checkpointer() as checkpointer:
        try:
            described = checkpointer.metadata(folder.absolute()).item_metadata
            if described is None:  # orbax turns most failures of its own into this
                raise ValueError("its description is damaged")
            _compare(folder, {path: (m.shape, m.dtype) for path, m in trees.iterate(described.tree)}, expected)
            restore = trees.map_by_path(lambda *_: ocp.RestoreArgs(restore_type=np.ndarray), trees.unflatten(expected))
            return trees.flatten(checkpointer.restore(folder.absolute(), restore_args=restore))
        except InputError:
            raise
        except Exception as error:  # whatever type orbax and TensorStore raise, the item is what is at fault
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{folder}: orbax cannot read this item: {reason}") from error


def _compare(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for path in sorted({**expected, **found}):
        have, want = found.get(path), expected.get(path)
        if have is None or want is None or tuple(have[0]) != tuple(want[0]) or np.dtype(have[1]) != np.dtype(want[1]):
            raise InputError(f"{folder}: {path} is {_words(have)} in the item and {_words(want)} in the manifest")


def _words(array: Any) -> str:
    return "absent" if array is None else f"{np.dtype(array[1])} {list(array[0])}"
