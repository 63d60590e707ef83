"""`cluscomp doctor`: versions, devices and memory, what is missing, and how to install it. Changes nothing."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_jax.cli.arguments import DoctorArguments
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.reporting.tables import format_bytes, format_table
from cluscomp_jax.runtime.extras import install_command

_NEEDED = (
    "cluscomp-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "transformers",
    "huggingface-hub", "safetensors", "gguf", "tyro", "rich",
)  # fmt: skip
"""The core, and what the command line adds to it."""
_OPTIONAL = {
    "datasets": ("named data sets such as wikitext2", "hf"),
    "matplotlib": ("the HTML reports of runs", "report"),
    "tensorboardX": ("--tensorboard", "tensorboard"),
    "lm-eval": ("standard evaluation", "lm-eval"),
    "torch": ("comparisons with PyTorch", "parity"),
    "aqlm": ("loading AQLM exports in PyTorch", "parity"),
}
_DRIVER = Path("/proc/driver/nvidia/version")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def run(arguments: DoctorArguments) -> Result:
    """Returns versions, devices, memory, and advice."""
    needed = {name: _version(name) for name in _NEEDED}
    optional = {name: _version(name) for name in _OPTIONAL}
    devices = _devices()
    memory = _host_memory()
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    driver = _DRIVER.exists() or shutil.which("nvidia-smi") is not None
    plugin = next((name for name in _PLUGINS if _version(name)), None)
    advice = _advice(needed, optional, devices, driver=driver, plugin=plugin)
    rows = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        *((name, version or "missing") for name, version in needed.items()),
        *((f"{name} (optional)", version or "not installed") for name, version in optional.items()),
        *((f"device {i}", _describe(device)) for i, device in enumerate(devices)),
        ("NVIDIA driver", "found" if driver else "not found"),
        ("JAX's CUDA plugin", plugin or "not installed"),
        ("host memory", f"{format_bytes(memory['available'])} available of {format_bytes(memory['total'])}"),
        ("scratch disk", f"{format_bytes(disk)} free in {tempfile.gettempdir()}"),
    ]
    fields = {
        "python": platform.python_version(),
        "versions": needed,
        "optional": optional,
        "devices": devices,
        "nvidia_driver": driver,
        "cuda_plugin": plugin,
        "host_memory_bytes": memory,
        "scratch_free_bytes": disk,
        "advice": advice,
    }
    return Result("\n".join([format_table(("what", "found"), rows), "", *advice]), fields)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """Returns what JAX computes on, after one small computation on each device."""
    import jax
    import jax.numpy as jnp

    found = []
    for device in jax.devices():
        total = float(jnp.sum(jax.device_put(jnp.ones((64, 64)), device) @ jnp.ones((64, 64))))
        stats = device.memory_stats() or {}
        found.append(
            {
                "platform": device.platform,
                "kind": device.device_kind,
                "memory_bytes": stats.get("bytes_limit"),
                "computes": total == 64.0**3,
            }
        )
    return found


def _describe(device: Mapping[str, Any]) -> str:
    memory = "" if device["memory_bytes"] is None else f", {format_bytes(device['memory_bytes'])}"
    return f"{device['kind']} ({device['platform']}{memory}){'' if device['computes'] else ': WRONG RESULTS'}"


def _host_memory() -> dict[str, int]:
    """Returns the bytes of memory in all and those that a process could get now."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    information = Path("/proc/meminfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return {"total": total, "available": available}


def _advice(
    needed: Mapping[str, str | None],
    optional: Mapping[str, str | None],
    devices: list[dict[str, Any]],
    *,
    driver: bool,
    plugin: str | None,
) -> list[str]:
    advice = [f"{name} is missing: {install_command('cli')}" for name, v in needed.items() if not v]
    advice += [f"{_describe(device)}; do not use this device" for device in devices if not device["computes"]]
    gpu = any(device["platform"] == "gpu" for device in devices)
    if gpu:
        advice.append("A GPU is in use.")
    elif plugin and driver:
        advice.append(
            "Driver and CUDA plugin are there, but JAX runs on the CPU; is JAX_PLATFORMS set, is the GPU free?"
        )
    elif plugin:
        advice.append("JAX's CUDA plugin is installed, but there is no NVIDIA driver; install one for this GPU.")
    elif driver:
        advice.append(f"An NVIDIA driver is there, but JAX has no CUDA plugin: {install_command('cuda12')}")
    else:
        advice.append(f"No GPU was found: everything runs on the CPU. With one: {install_command('cuda12')}")
    for name, version in optional.items():
        if version is None:
            purpose, extra = _OPTIONAL[name]
            advice.append(f"For {purpose}: {install_command(extra)}")
    return list(dict.fromkeys(advice))
