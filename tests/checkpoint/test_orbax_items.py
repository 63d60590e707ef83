"""An item that cannot be read ends in one error, and nothing else is printed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coded_items import write_coded_item

READ = """
import sys
from pathlib import Path
import numpy as np
from cluscomp_jax.errors import InputError
from cluscomp_jax.checkpoint import orbax_items
expected = {f"a/{i}": ((400, 1000), np.dtype("float32")) for i in range(12)}
for _ in range(8):
    try:
        orbax_items.read_item(Path(sys.argv[1]), expected)
    except InputError as error:
        assert "\\n" not in str(error)
        print(str(error))
"""


@pytest.mark.parametrize(
    "damage", ["chunk", *(pytest.param(name, marks=pytest.mark.long) for name in ("coded", "described"))]
)
def test_a_read_that_fails_says_one_line(tmp_path: Path, damage: str) -> None:
    random = np.random.default_rng(0)
    arrays = {f"a/{i}": random.standard_normal((400, 1000)).astype(np.float32) for i in range(12)}
    write_coded_item(tmp_path / "item", arrays)
    if damage == "chunk":
        (tmp_path / "item/a.0/0.0").unlink()
    elif damage == "coded":
        (tmp_path / "item/a.0/0.0").write_bytes(b"\x28\xb5\x2f\xfd\x00\x58")
    else:
        (tmp_path / "item/a.0/.zarray").write_text("{")
    command = [sys.executable, "-c", READ, str(tmp_path / "item")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 8
    assert all("orbax cannot read this item" in line for line in done.stdout.splitlines())
