"""Prefetch of the next block, and write-back of the last one, each in a thread of its own. Knows no file format.

Order and bytes are those of reading and writing in turn; only the time is less.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.source import ParamSource
from cluscomp_jax.runtime.timing import StageTimer

PREFETCH, WRITE_BACK = "prefetch", "write back"
"""The stages of a timer that run at the same time as the others."""


class BlockReader:
    """Returns the blocks of a source from `first` to the last, and reads the next one in advance after `read_next`.

    Holds at most one block that has not been asked for, and none before `read_next`: where memory is short, the caller
    first frees the block it has. Use as a context manager.
    """

    def __init__(self, source: ParamSource, num_blocks: int, clock: StageTimer, first: int = 0):
        self._source, self._num_blocks, self._clock, self._taken = source, num_blocks, clock, first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._next: Future[Params] | None = None

    def __enter__(self) -> "BlockReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, i: int) -> Params:
        """Returns block i, host arrays by block-relative paths, and drops it; i counts up from the first, one by one.

        Blocks until it is read, and reads it first if `read_next` was not called.

        Raises:
          Exception: whatever reading the block raised.
        """
        self.read_next()
        assert self._next is not None
        assert i == self._taken
        block = self._next.result()
        self._next, self._taken = None, i + 1
        return block

    def read_next(self) -> None:
        """Begins to read the block after those taken, if there is one and it is not being read."""
        if self._next is None and self._taken < self._num_blocks:
            self._next = self._thread.submit(self._read, self._taken)

    def _read(self, i: int) -> Params:
        with self._clock.concurrent(PREFETCH):
            block = self._source.load_block(i)
            self._clock.release()
            return block


class BlockWriter:
    """Runs one write after another in a thread, at most one at a time.

    Use as a context manager: it ends when the last write has ended, even where the block inside raises.
    """

    def __init__(self, clock: StageTimer):
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._last: Future[None] | None = None

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)

    def put(self, write: Callable[[], None]) -> None:
        """Begins a write once the one before has ended.

        Raises:
          Exception: whatever the one before raised; this one is not begun.
        """
        self.wait()
        self._last = self._thread.submit(self._run, write)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          Exception: whatever the last write raised.
        """
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def _run(self, write: Callable[[], None]) -> None:
        with self._clock.concurrent(WRITE_BACK):
            write()
