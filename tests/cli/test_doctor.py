"""`doctor` and `completion`: what they find, what they advise, and a script that bash takes."""

import importlib.metadata
import json
import shutil
import subprocess
from typing import Any

import jax
import pytest

from cluscomp_jax.cli import doctor, main

CPU = {"platform": "cpu", "kind": "cpu", "memory_bytes": None, "computes": True}
GPU = {"platform": "gpu", "kind": "NVIDIA A6000", "memory_bytes": 2**34, "computes": True}


def test_it_finds_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    fields = json.loads(last)
    assert fields["versions"]["jax"] == importlib.metadata.version("jax")
    assert all(fields["versions"].values())
    assert len(fields["devices"]) == len(jax.devices())
    assert all(device["computes"] for device in fields["devices"])
    memory = fields["host_memory_bytes"]
    assert 0 < memory["available"] <= memory["total"]
    assert fields["advice"] == table[-len(fields["advice"]) :]


CASES: dict[str, tuple[list[dict[str, Any]], bool, str | None, str]] = {
    "nothing": ([CPU], False, None, "No GPU was found"),
    "no plugin": ([CPU], True, None, 'pip install "cluscomp-jax[cuda12]"'),
    "no driver": ([CPU], False, "jax-cuda12-plugin", "no NVIDIA driver"),
    "not used": ([CPU], True, "jax-cuda12-plugin", "JAX runs on the CPU"),
    "used": ([GPU], True, "jax-cuda12-plugin", "A GPU is in use."),
    "broken": ([{**GPU, "computes": False}], True, "jax-cuda12-plugin", "WRONG RESULTS"),
}


@pytest.mark.parametrize(("devices", "driver", "plugin", "words"), CASES.values(), ids=CASES)
def test_the_advice_fits_what_was_found(
    devices: list[dict[str, Any]], driver: bool, plugin: str | None, words: str
) -> None:
    advice = doctor._advice({"jax": "1"}, {"matplotlib": None, "torch": "2"}, devices, driver=driver, plugin=plugin)
    assert any(words in line for line in advice)
    assert any('pip install "cluscomp-jax[report]"' in line for line in advice)
    assert not any("PyTorch" in line for line in advice)


def test_a_missing_package_is_named() -> None:
    advice = doctor._advice({"jax": None}, {}, [CPU], driver=False, plugin=None)
    assert advice[0].startswith("jax is missing")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash is installed")
def test_bash_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tyro-print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = "COMP_WORDS=(cluscomp {}); COMP_CWORD={}; _tyro_cluscomp; echo ${{COMPREPLY[@]}}"
    asked = "\n".join([script, words.format("exp", 1), words.format("export --format or", 3)])
    done = subprocess.run(["bash"], input=asked, check=True, capture_output=True, text=True, timeout=60)
    assert [set(line.split()) for line in done.stdout.splitlines()] == [{"export"}, {"orbax", "orbax-codebook"}]
