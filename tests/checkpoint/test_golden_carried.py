"""The committed checkpoint of format version 4, of a vision-language model, loads and exports for ever to its bytes."""

import json
import struct
from pathlib import Path

from paths import FIXTURES
from vlm_models import read_raw

from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.export import export_checkpoint

GOLDEN = FIXTURES / "golden_v4"
TOWER = {
    "vision_tower.scale": ("F32", [3], struct.pack("<3I", 0x7FC00000, 0x7FC12345, 0x3F800000)),
    "vision_tower.steps": ("I64", [], struct.pack("<q", 7)),
}


def test_what_is_around_the_text_model_is_exported_as_it_was(tmp_path: Path) -> None:
    source = open_checkpoint(GOLDEN, verify=True)
    assert json.loads((GOLDEN / "manifest.json").read_text())["format_version"] == 4
    export_checkpoint(source, tmp_path / "out", "dense")
    found = read_raw(tmp_path / "out/model.safetensors")
    assert {name: tensor for name, tensor in found.items() if name in TOWER} == TOWER
    inside = found.keys() - TOWER.keys()
    assert all(name.startswith("language_model.model.") for name in inside)
    assert len(inside) == 11


def test_its_kernels_are_those_of_version_3() -> None:
    def bytes_of(folder: Path) -> dict[str, bytes]:
        files = (folder / "blocks/00000").rglob("0*")
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files if file.is_file()}

    found = bytes_of(GOLDEN)
    assert len(found) > 7
    assert found == bytes_of(FIXTURES / "golden_v3")
