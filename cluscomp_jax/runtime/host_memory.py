"""Memory of the host: what the C allocator keeps between steps and gives back between stages, what XLA asks of it."""

import ctypes
import gc
import os
import sys
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 512 * 2**20


def keep_freed_memory() -> bool:
    """Has glibc keep up to 512 MiB of freed memory for the next request; returns whether it does.

    XLA on the CPU allocates the scratch memory of every call. From 32 MiB on glibc fetches it from the operating system
    and gives it back each time, and the page faults take a fifth of a tuning step. A setting of the whole process:
    the command line asks for it, the library never does by itself. Does nothing where the C library is not glibc.
    """
    libc = _glibc()
    if libc is None:
        return False
    return all(libc.mallopt(option, _KEPT_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def return_freed_memory() -> bool:
    """Gives what was freed, and is not used again, back to the kernel; returns whether anything was.

    What glibc keeps is in pieces between what is still in use. A stage that asks for larger pieces than the one
    before finds none that fit, and the process grows by the difference: by several blocks' worth where a kernel has
    hundreds of megabytes. Called between stages; no setting is changed. Does nothing where the C library is not glibc.

    Host arrays that JAX read in place, without a copy, it frees at the next garbage collection after their buffers
    are gone; the youngest generation is enough for that.
    """
    gc.collect(0)
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


def schedule_for_memory() -> bool:
    """Has XLA on the CPU order a program by the memory it takes; returns whether XLA accepts that.

    Left to itself XLA orders by what could run side by side. Where the processor does not multiply a 16-bit type, it
    then turns all kernels of a block to float32 before the first product: a block of Llama-2-70B takes twice its
    memory. Products already use all cores, and no bit of a result depends on it. A setting of the whole process, in
    XLA_FLAGS, that counts if JAX has compiled nothing yet: the command line asks for it, the library never does by
    itself. What XLA_FLAGS says already stays, and a release of jaxlib in which the flag was not tried is left alone.
    """
    from pallas_kernels import _compat  # imports JAX, which `--help` does without

    flags = os.environ.get("XLA_FLAGS", "")
    if _compat.CPU_SCHEDULER in flags or not _compat.tried("jaxlib", patches=True):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} --{_compat.CPU_SCHEDULER}=false".strip()
    return True


def _glibc() -> Any:
    """Returns the C library of this process, or None where it is another."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
