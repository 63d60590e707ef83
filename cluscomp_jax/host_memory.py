"""The C allocator's settings for steps that take and free tens of megabytes of scratch memory over and over."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 512 * 2**20


def keep_freed_memory() -> bool:
    """Has glibc keep up to 512 MiB of freed memory for the next request; returns whether it does.

    XLA on the CPU asks for the scratch memory of every call anew. From 32 MiB on glibc fetches it from the kernel
    and gives it back each time, and the page faults take a fifth of a tuning step. A setting of the whole process:
    the command line asks for it, the library never does by itself. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(option, _KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
