"""Nothing reaches one of the process's own streams, for libraries that write past every setting. Knows none of them."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silenced(descriptor: int) -> Iterator[None]:
    """What is written to the file descriptor meanwhile, 1 or 2, is lost, native code's too."""
    (sys.stdout if descriptor == 1 else sys.stderr).flush()
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nowhere)
