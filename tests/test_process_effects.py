"""What a run does to the process around it: a library call nothing, the command line what it says."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import ctypes, json, sys
from pathlib import Path
import jax
import numpy as np
from cluscomp_jax import CompressionRule, CompressConfig, compress, llama, perplexity
from cluscomp_jax.pipeline import compress_stream
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.models.source import DictSink, as_source
from cluscomp_jax.models.model import build_model

calls, load, write = [], ctypes.CDLL, Path.write_text

class Watched:
    def __init__(self, library):
        self._library = library

    def __getattr__(self, name):
        calls.append(name)
        return getattr(self._library, name)

def written(path, *args, **options):
    if str(path).startswith("/proc"):
        calls.append(str(path))
    return write(path, *args, **options)

ctypes.CDLL = lambda *args, **options: Watched(load(*args, **options))
Path.write_text = written
config = llama.LlamaConfig(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)
cfg = CompressConfig(
    model=config,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=12),), iterations=1, error_feedback=False),
    calibration=CalibrationConfig(samples=2, length=8),
    tuning=None,
)
params, tokens = llama.init_params(config, jax.random.key(0)), np.arange(16, dtype=np.int32).reshape(2, 8)
if sys.argv[1] == "library":
    compress(params, cfg, calibration=tokens)
    perplexity(params, tokens.reshape(-1), config, context=8)
    peaks = None
else:
    source = as_source(params, build_model(config))
    folder = Path(sys.argv[2])
    done = compress_stream(source, DictSink(), cfg, calibration=tokens, work_dir=folder, owns_process=True)
    peaks = [stage["peak_rss_bytes"] for stage in done.stages.values()]
print(json.dumps({"calls": sorted(set(calls) & {"malloc_trim", "mallopt", "/proc/self/clear_refs"}), "peaks": peaks}))
"""


def run(how: str, folder: Path) -> dict:
    command = [sys.executable, "-c", RUN, how, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_a_library_call_leaves_the_process_alone(tmp_path: Path) -> None:
    assert run("library", tmp_path)["calls"] == []


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_a_run_that_owns_its_process_measures_every_stage(tmp_path: Path) -> None:
    found = run("own", tmp_path)
    assert "/proc/self/clear_refs" in found["calls"]
    assert "malloc_trim" in found["calls"] or platform.libc_ver()[0] != "glibc"
    assert found["peaks"]
    assert all(peak > 10**7 for peak in found["peaks"])
