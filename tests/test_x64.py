"""`jax_enable_x64` in the caller's process changes nothing: what is float32 or int32 says so."""

import json
import os
import subprocess
import sys

import jax
import pytest
from paths import HELPERS

from pallas_kernels._compat import lowering_for
from verify_kernels.cases import Case

PROGRAM = HELPERS / "x64_runs.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    def run(x64):
        out = tmp_path_factory.mktemp("x64") / "runs.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, PROGRAM, out]
        done = subprocess.run(
            command, env=environment | {"JAX_ENABLE_X64": x64}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    return run("0"), run("1")


@pytest.mark.long
def test_results_have_the_same_bytes(runs):
    narrow, wide = runs
    assert (narrow.pop("x64"), wide.pop("x64")) == (False, True)
    assert len(narrow) > 10
    assert {name for name in narrow if narrow[name] != wide[name]} == set()


@pytest.mark.parametrize("kernel", ["forward", "dx", "scatter", "segment"])
def test_gpu_kernels_are_lowered(kernel):
    function, arguments = Case(kernel=kernel, m=32, shape=(64, 64), g=4, n=256).call()
    with jax.enable_x64(True), lowering_for((8, 6)):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text
