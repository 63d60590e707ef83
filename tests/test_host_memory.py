"""Keeping freed memory: glibc takes the setting, other systems are left alone."""

import platform
import subprocess
import sys

import pytest

from cluscomp_jax.host_memory import keep_freed_memory, return_freed_memory

_FAULTS = """
import resource, sys
import numpy as np
from cluscomp_jax.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
np.ones(12_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

_RESIDENT = """
import re
from pathlib import Path
import numpy as np
from cluscomp_jax.host_memory import keep_freed_memory, return_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
keep_freed_memory()
arrays = [np.ones(1_000_000) for _ in range(40)]
last = arrays.pop()
full = resident()
arrays.clear()
kept = resident()
return_freed_memory()
print(full - kept, full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_kept_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _RESIDENT], capture_output=True, check=True)
    gone, given_back = map(int, done.stdout.split())
    assert gone < 40_000  # of 312,000 kB: one array that is still there keeps all below it
    assert given_back > 250_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_not_fetched_from_the_kernel_again() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "leave")
    }
    assert faults["keep"] < faults["leave"] / 10


def test_a_system_without_glibc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert return_freed_memory() is False
