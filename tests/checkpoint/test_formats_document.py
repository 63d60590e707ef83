"""The code of docs/formats.md decodes a saved tree to the same bits where cluscomp_jax cannot be imported."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
from hypothesis import given, seed, settings
from paths import ROOT
from random_trees import codebook_arrays

from cluscomp_jax import save
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import HostAxes

BEFORE = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        assert name.split(".")[0] not in ("cluscomp_jax", "pallas_kernels"), name
sys.meta_path.insert(0, Refuse())
"""
AFTER = """
assert "cluscomp_jax" not in sys.modules
np.savez(sys.argv[1], **{path: np.frombuffer(w.tobytes(), np.uint8) for path, w in decoded.items()})
print(json.dumps({path: [list(w.shape), w.dtype.name] for path, w in decoded.items()}))
"""


def snippet(folder):
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8").split("## A tree of any codebase")[1]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code.replace("/absolute/path/of/out", str(folder))


def drawn_arrays():
    """Twenty arrays, the same in every run."""
    drawn = []

    @seed(0)
    @settings(max_examples=20, database=None)
    @given(codebook_arrays())
    def draw(w):
        drawn.append(w)

    draw()
    return drawn


def test_plain_orbax_decodes_a_saved_tree_bit_for_bit(tmp_path):
    random = np.random.default_rng(0)
    codes, index = random.standard_normal((300, 2, 4)).astype(np.float16), random.integers(0, 300, (8, 2, 3))
    host = HostAxes((3, 8, 4), (1, 0, 2), 1, stack_at=1, dtype="bfloat16")
    arrays = [CodebookArray(codes, index.astype(np.uint16), (8, 12), "out", None, host), *drawn_arrays()]
    assert len({len(w.stack) for w in arrays}) == 3
    assert {w.host is None for w in arrays} == {True, False}
    one = CodebookArray(np.ones((1, 4), ml_dtypes.bfloat16), np.zeros((3, 2), np.uint8), (3, 7))
    tied = dataclasses.replace(arrays[0], tied_to="owner")
    save(tmp_path / "out", {"layers": arrays, "one": one, "block": {"owner": arrays[0], "tied": tied}})
    program = BEFORE + snippet(tmp_path / "out") + AFTER
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "decoded.npz"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    decoded = np.load(tmp_path / "decoded.npz")
    expected = {f"layers/{i}": w for i, w in enumerate(arrays)} | {"one": one}
    expected |= {"block/owner": arrays[0], "block/tied": tied}
    described = json.loads(done.stdout)
    assert set(described) == set(expected)
    for path, w in expected.items():
        dense = np.asarray(w)
        assert described[path] == [list(dense.shape), dense.dtype.name], path
        assert decoded[path].tobytes() == dense.tobytes(), path
