"""The outcome of a command: lines on standard output, or one line on standard error, and an exit code.

Knows no command. Exit codes: 0 done, 1 failed, 2 wrong input.
"""

import dataclasses
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluscomp_jax.errors import DivergedError, InputError, RunError

DONE, FAILED, WRONG_INPUT = 0, 1, 2
_WRONG_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command returns.

    Attributes:
      text: for a person.
      fields: for a program, plain JSON values.
      code: exit code; FAILED where the command was done and the answer is no.
    """

    text: str
    fields: Mapping[str, Any]
    code: int = DONE


def run(command: Callable[[], Result], *, json: bool, debug: bool, resumable: bool) -> int:
    """Returns the exit code of `command`, after printing its result or its error.

    Args:
      json: end standard output with `fields` as one line.
      debug: print the traceback of an error as well.
      resumable: whether giving the command again continues it.
    """
    hint = "; give the same command again to resume" if resumable else ""
    try:
        with _terminable(), _one_error(debug):
            result = command()
        _print_result(result, json=json)
        return result.code
    except KeyboardInterrupt as error:
        return _failed(error, f"stopped by {str(error) or 'the keyboard'}{hint}", FAILED, debug)
    except InputError as error:
        return _failed(error, str(error), WRONG_INPUT, debug)
    except DivergedError as error:
        return _failed(error, str(error), FAILED, debug)
    except RunError as error:
        return _failed(error, f"{error}{hint}", FAILED, debug)
    except BrokenPipeError:  # the reader of standard output has ended; the interpreter must not flush it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        wrong = isinstance(error, _WRONG_PATH) or error.errno == errno.EROFS
        return _failed(error, str(error) if wrong else f"{error}{hint}", WRONG_INPUT if wrong else FAILED, debug)
    except Exception as error:
        return _failed(error, f"{type(error).__name__}: {error} (--debug shows where)", FAILED, debug)


def note(text: str) -> None:
    """Prints one line that is no result to standard error."""
    print(f"cluscomp: {text}", file=sys.stderr, flush=True)


def _print_result(result: Result, *, json: bool) -> None:
    if result.text:
        print(result.text)
    if json:
        from cluscomp_jax.runtime.reporter import to_json

        print(to_json(result.fields))
    sys.stdout.flush()


def _failed(error: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"cluscomp: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _one_error(debug: bool) -> Iterator[None]:
    """Drops what the other tasks of a save or a read say when one has failed; that one's error is printed.

    They are tasks of asyncio that are no longer awaited, and calls of TensorStore to a loop that is closed.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level
    if not debug and not isinstance(hook, _NoClosedLoop):
        sys.unraisablehook = _NoClosedLoop(hook)
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception:  # all of it stays: some come at the end of the process
        if not debug:
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    sys.unraisablehook = hook
    logger.setLevel(level)


class _NoClosedLoop:
    """An unraisablehook that drops one error, and gives all others to the hook before it."""

    def __init__(self, before: Callable[["sys.UnraisableHookArgs"], object]):
        self._before = before

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt inside, so that both ways of stopping clean up alike."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
