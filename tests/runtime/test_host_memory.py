"""Memory of the host: glibc and XLA take the settings, other systems and versions are left alone."""

import importlib.metadata
import os
import platform
import subprocess
import sys

import pytest

from cluscomp_jax.runtime.host_memory import keep_freed_memory, return_freed_memory, schedule_for_memory

_FAULTS = """
import resource, sys
import numpy as np
from cluscomp_jax.runtime.host_memory import keep_freed_memory
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
from cluscomp_jax.runtime.host_memory import keep_freed_memory, return_freed_memory
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

_SCRATCH = """
import sys
from cluscomp_jax.runtime.host_memory import schedule_for_memory
if sys.argv[1] == "memory":
    assert schedule_for_memory()
import jax
import jax.numpy as jnp
kernels = [jax.ShapeDtypeStruct((512, 512), "float16")] * 8
def apply(x, kernels):
    for kernel in kernels:
        x = x @ kernel
    return x
compiled = jax.jit(apply).lower(jax.ShapeDtypeStruct((64, 512), "float16"), kernels).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""
FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"


@pytest.mark.long
def test_one_kernel_after_the_other_is_turned_to_float32() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    scratch = {
        mode: int(
            subprocess.run([sys.executable, "-c", _SCRATCH, mode], capture_output=True, check=True, env=plain).stdout
        )
        for mode in ("memory", "as it is")
    }
    # A processor that multiplies float16 as it is needs neither.
    assert scratch["memory"] < 3 * 4 * 512 * 512
    assert scratch["memory"] <= scratch["as it is"]


def test_flags_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=true --xla_dump_to=here")
    assert schedule_for_memory() is False
    assert os.environ["XLA_FLAGS"] == f"{FLAG}=true --xla_dump_to=here"
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    assert schedule_for_memory() is True
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=here {FLAG}=false"


@pytest.mark.parametrize("version", ["0.9.2", "0.11rc1", "1.0.dev2", "unknown"])
def test_a_version_that_may_not_know_the_flag_is_not_given_it(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert schedule_for_memory() is False
    assert "XLA_FLAGS" not in os.environ


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
