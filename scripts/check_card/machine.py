"""Facts of the machine without JAX: cards by the driver, versions by their metadata, the commit by git."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "flax", "optax", "tokenizers", "transformers", "safetensors")
_PLUGINS = tuple(f"jax-cuda{version}-{part}" for version in (12, 13) for part in ("plugin", "pjrt"))
_QUERY = "name,driver_version,memory.total,compute_cap"
MEMORY_FRACTION = "0.85"
"""Of the card's memory for JAX; the rest is the CUDA context's and that of libraries."""


def nvidia_smi() -> list[dict[str, str]]:
    """Returns what the driver reports of each card; nothing where there is no driver."""
    lines = _first_lines(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"])
    names = _QUERY.split(",")
    cards = [dict(zip(names, map(str.strip, line.split(",")), strict=False)) for line in lines]
    return [card for card in cards if len(card) == len(names)]


def has_card() -> bool:
    """Returns whether an NVIDIA GPU is there; initialises none."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists() or bool(nvidia_smi())


def versions() -> dict[str, str]:
    """Returns {distribution: version} of those installed, and Python's."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_PLUGINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def project(root: Path) -> dict[str, Any]:
    """Returns the version and commit of the checkout; None where that is unknown."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8") if (root / "pyproject.toml").is_file() else ""
    version = next((line.split('"')[1] for line in text.splitlines() if line.startswith('version = "')), None)
    commit = _first_lines(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _first_lines(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return {"version": version, "commit": commit[0] if commit else None, "changed_files": len(changed)}


def child_environment(dry: bool) -> dict[str, str]:
    """Returns what is set for the processes of the steps, apart from what they inherit."""
    shared = {"JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}
    if dry:  # tiny programs take longer to compile than to run
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
        return {**shared, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return {
        **shared,
        "JAX_PLATFORMS": "cuda,cpu",
        "CUDA_VISIBLE_DEVICES": (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0],  # one is measured
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION,
    }


def _first_lines(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10, env=os.environ | {"LC_ALL": "C"}
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
