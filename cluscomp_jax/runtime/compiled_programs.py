"""Where commands keep compiled programs, decided before JAX starts. For a command, which owns its process."""

import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

from cluscomp_jax.runtime.user_cache import user_cache

_MAX_BYTES = 2 * 2**30
"""What the folder may grow to; the programs that were not used for longest go first."""
_LEAST_SECONDS = 0.2
"""Programs that compile faster than this are not kept."""
_DECIDED_BY = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_NUM_CPU_DEVICES")
_SEVERAL_DEVICES = "xla_force_host_platform_device_count"


def keep_compiled_programs() -> bool:
    """Has JAX keep what it compiles for the next command on the same shapes; returns whether it did.

    The folder is `programs_folder` of the user's cache. Nothing is kept where an environment variable of JAX decides
    on its cache, where the CPU serves as several devices (their programs, read again, hang at times), or where the
    package filelock, which bounds the folder, is not installed.
    """
    if any(name in os.environ for name in _DECIDED_BY) or _SEVERAL_DEVICES in os.environ.get("XLA_FLAGS", ""):
        return False
    if importlib.util.find_spec("filelock") is None:
        return False
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs_folder(user_cache() / "cluscomp-jax" / "programs"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MAX_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))
    return True


def programs_folder(root: Path, *more: str) -> Path:
    """Returns the folder in `root` for the programs of this processor and number of threads, and of what `more` says.

    A home folder can be that of several machines, and XLA compiles for the processor that it runs on.
    """
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    key = "\n".join([sys.platform, platform.machine(), flags, str(threads), os.environ.get("NPROC", ""), *more])
    return root / hashlib.sha256(key.encode()).hexdigest()[:16]
