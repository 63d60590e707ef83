"""The C allocator: kept memory for steps that take and free scratch over and over, and given back between stages."""

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 512 * 2**20


def keep_freed_memory() -> bool:
    """Has glibc keep up to 512 MiB of freed memory for the next request; returns whether it does.

    XLA on the CPU asks for the scratch memory of every call anew. From 32 MiB on glibc fetches it from the kernel
    and gives it back each time, and the page faults take a fifth of a tuning step. A setting of the whole process:
    the command line asks for it, the library never does by itself. Does nothing where the C library is not glibc.
    """
    libc = _glibc()
    if libc is None:
        return False
    return all(libc.mallopt(option, _KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def return_freed_memory() -> bool:
    """Gives what was freed, and is not used again, back to the kernel; returns whether anything was.

    What glibc keeps lies in pieces between what is still in use. A stage that asks for larger pieces than the one
    before finds none that fit, and the process grows by the difference: by several blocks' worth where a kernel has
    hundreds of megabytes. Called between stages; no setting is changed. Does nothing where the C library is not glibc.
    """
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


def _glibc() -> Any:
    """Returns the C library of this process, or None where it is another."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
