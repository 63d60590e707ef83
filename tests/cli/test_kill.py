"""A run that is killed outright, with no chance to clean up, and given again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from cli_models import tensors, write_text, write_tokenizer
from io_models import config_fields, write_hf

from cluscomp_jax.checkpoint.reader import load_checkpoint, open_checkpoint
from cluscomp_jax.errors import InputError

pytestmark = pytest.mark.long

BLOCKS = 4
CONFIG = """
seed = 3
[[cluster.rules]]
pattern = 'model/layers/\\d+/mlp/down_proj/kernel'
num_codes = 8
[calibration]
samples = 4
length = 16
[tuning]
epochs = 2
"""


def write_deep_model(folder: Path) -> None:
    """The tiny model with its two blocks repeated, so that a kill meets it at work."""
    deep = {}
    for name, array in tensors().items():
        start, layers, outer = name.partition("model.layers.")
        if not layers:
            deep[name] = array
            continue
        block, _, leaf = outer.partition(".")
        for i in range(int(block), BLOCKS, 2):
            deep[f"{start}{layers}{i}.{leaf}"] = array
    write_hf(folder, config_fields(num_hidden_layers=BLOCKS), deep)
    write_tokenizer(folder)


def start(folder: Path, out: Path) -> "subprocess.Popen[str]":
    """Starts `cluscomp compress` into `out`; all runs share compiled programs, which saves most of their time."""
    command = [sys.executable, "-m", "cluscomp_jax", "compress", str(folder / "model"), "--out", str(out)]
    options = ["--config", str(folder / "run.toml"), "--calibration", str(folder / "text.txt")]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*command, *options], env={**os.environ, **cache}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Waits for a run that must succeed and returns its standard error."""
    _, err = process.communicate()
    assert process.returncode == 0, err
    return err


def untimed(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl less the times in them."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in ("time", "seconds")}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return [strip(json.loads(line)) for line in path.read_text().splitlines()]


def test_a_killed_run_given_again_ends_in_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    write_deep_model(tmp_path / "model")
    write_text(tmp_path / "text.txt", 400)
    (tmp_path / "run.toml").write_text(CONFIG)
    whole, out = tmp_path / "whole", tmp_path / "out"
    with start(tmp_path, out) as victim:
        while not (out / "blocks" / "00000").is_dir():
            assert victim.poll() is None, victim.communicate()
            time.sleep(0.005)
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    finished = len(list((out / "blocks").iterdir()))
    assert 1 <= finished < BLOCKS
    (out / "metrics.jsonl").write_text('{"event": "block", "time": 17')  # as a full disk tears a line
    assert f"resuming after {finished} of {BLOCKS} finished blocks" in finish(start(tmp_path, out))
    finish(start(tmp_path, whole))
    chex.assert_trees_all_equal(load_checkpoint(out).params, load_checkpoint(whole).params)
    assert open_checkpoint(out, verify=True).fingerprint() == open_checkpoint(whole).fingerprint()
    assert untimed(out / "metrics.jsonl") == untimed(whole / "metrics.jsonl")
    assert [record["index"] for record in untimed(out / "metrics.jsonl")] == list(range(BLOCKS))
    for folder in (out, whole):
        assert stray_files(folder) == set()


def stray_files(folder: Path) -> set[str]:
    listed = json.loads((folder / "manifest.json").read_text())["files"].keys()
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return there - listed - {"manifest.json", "metrics.jsonl"}


@pytest.mark.slow
def test_a_run_killed_at_any_of_twenty_moments_ends_in_the_same_bytes(tmp_path: Path) -> None:
    write_deep_model(tmp_path / "model")
    write_text(tmp_path / "text.txt", 400)
    (tmp_path / "run.toml").write_text(CONFIG)
    finish(start(tmp_path, tmp_path / "warm"))  # fills the cache of compiled programs
    began = time.monotonic()
    whole = tmp_path / "whole"
    finish(start(tmp_path, whole))
    expected, seconds = load_checkpoint(whole).params, time.monotonic() - began
    moments = np.random.default_rng(0).uniform(0, seconds, 20)
    killed = 0
    for i, moment in enumerate(moments):
        out = tmp_path / f"out-{i}"
        with start(tmp_path, out) as victim:
            with contextlib.suppress(subprocess.TimeoutExpired):
                victim.wait(moment)
            victim.kill()
            killed += victim.wait() == -signal.SIGKILL
        if not (out / "manifest.json").exists():
            with pytest.raises(InputError):
                load_checkpoint(out)
            finish(start(tmp_path, out))
        elif (out / "work").exists():  # killed between the manifest and the removal of work/
            assert start(tmp_path, out).wait() == 2
        chex.assert_trees_all_equal(load_checkpoint(out).params, expected)
        assert open_checkpoint(out, verify=True).fingerprint() == open_checkpoint(whole).fingerprint()
        assert stray_files(out) == set()
        shutil.rmtree(out)
    assert killed >= 15  # the others had ended first
