"""`cluscomp finetune` in two processes that meet on the loopback: against one, and with one of them killed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_runs import finetune_argv, write_inputs

from cluscomp_jax.checkpoint.reader import load_checkpoint, open_checkpoint
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray

pytestmark = pytest.mark.slow
MESH = ("--mesh", "data=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("finetune"))


def start(folder: Path, out: Path, *more: str, steps: int = 12) -> "subprocess.Popen[str]":
    """Starts one process with one device."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluscomp_jax", *finetune_argv(folder, out, *more, steps=steps)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_both(folder: Path, out: Path, **options: Any) -> "list[subprocess.Popen[str]]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = ("--coordinator", address, "--num-processes", "2", "--process-id")
    return [start(folder, out, *MESH, *meeting, str(i), **options) for i in range(2)]


def finish(*processes: "subprocess.Popen[str]") -> None:
    """Waits for processes that must succeed."""
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss" if record["event"] == "step" else "nll"] for record in records]


def compare(found: Path, expected: Path) -> None:
    """Holds two results to each other within the rounding of stored codebooks."""
    assert len(losses(found)) == len(losses(expected))
    np.testing.assert_allclose(losses(found), losses(expected), rtol=1e-5)
    ours, theirs = (trees.flatten(load_checkpoint(path).params) for path in (found, expected))
    for path, leaf in theirs.items():
        if isinstance(leaf, CodebookArray):
            np.testing.assert_array_equal(ours[path].index, leaf.index)
            np.testing.assert_allclose(ours[path].codebook, leaf.codebook, atol=2e-3)
        else:
            np.testing.assert_allclose(ours[path], leaf, atol=2e-3)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    finish(start(folder, folder / "alone"))
    return folder / "alone"


def test_two_processes_train_what_one_trains(folder: Path, alone: Path, tmp_path: Path) -> None:
    finish(*start_both(folder, tmp_path / "out"))
    compare(tmp_path / "out", alone)
    provenance = open_checkpoint(tmp_path / "out", verify=True).manifest.provenance
    assert (provenance["mesh"], provenance["processes"]) == ("data=2,fsdp=1,tensor=1", 2)
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_killed_and_both_resume(folder: Path, alone: Path, tmp_path: Path, victim: int) -> None:
    out = tmp_path / "out"
    both = start_both(folder, out)
    while not list(out.glob("work/run/states/[0-9]*[0-9]")):
        assert [process.poll() for process in both] == [None, None], [process.communicate() for process in both]
        time.sleep(0.01)
    both[victim].kill()
    both[victim].communicate()
    assert both[1 - victim].communicate(timeout=300)[1]  # it ends by itself, and says why
    assert both[1 - victim].returncode != 0
    assert not (out / "manifest.json").exists()
    finish(*start_both(folder, out))
    assert open_checkpoint(out, verify=True).manifest.metrics["finetune"]["first_step"] > 0
    compare(out, alone)


def test_a_folder_that_is_taken_stops_both(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    both = start_both(folder, tmp_path / "out")
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [2, 1]
    assert "is not empty" in errors[0]
    assert "process 0 has stopped" in errors[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
