"""A program run in a process of its own whose CPU serves as several devices, for the tests of meshes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_on_devices(program: Path, count: int, out: Path) -> Any:
    """Returns the JSON that `python PROGRAM OUT` writes where JAX sees so many devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        # Threads of XLA: with one for each device, devices that wait for different sums leave none for the others.
        "NPROC": "64",
        # Programs of several CPU devices that come out of the cache hang or crash now and then (jax 0.10.2).
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run([sys.executable, program, out], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())
