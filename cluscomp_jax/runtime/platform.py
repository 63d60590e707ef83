"""Which platforms JAX is to look for, decided before it starts. For a command, which owns its process."""

import importlib.util
import os
import shutil
from pathlib import Path

_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""An NVIDIA GPU under Linux, and under Windows' Linux."""


def skip_absent_gpu() -> bool:
    """Has JAX start the CPU alone where its CUDA plugin is installed, there is no NVIDIA GPU, and nobody has chosen.

    Without it every command begins with the plugin's messages on libraries and drivers it does not find; who only plans
    for a GPU (the extra `aot`) has the plugin and no GPU. Returns whether it did.
    """
    if os.environ.get("JAX_PLATFORMS") is not None or os.environ.get("JAX_PLATFORM_NAME") is not None:
        return False
    if any(device.exists() for device in _DEVICES) or shutil.which("nvidia-smi"):
        return False
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    return True
