"""Every family against PyTorch's logits, committed by scripts/make_family_fixtures.py; needs no PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import CASES
from paths import FIXTURES
from safetensors import safe_open
from safetensors.numpy import save_file

from cluscomp_jax import open_model
from cluscomp_jax.models.decoder import DecoderConfig, forward
from cluscomp_jax.models.source import load_all

LOGITS = sorted((FIXTURES / "family_logits").glob("*.safetensors"))


def load(path: Path, folder: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """Returns (the model of the fixture, opened as a Hugging Face folder; tokens; logits)."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        (folder / "config.json").write_text(file.metadata()["config"])
    tokens, logits = tensors.pop("tokens"), tensors.pop("logits")
    save_file(tensors, folder / "model.safetensors")
    return open_model(folder), tokens, logits


def test_there_is_a_fixture_for_every_family() -> None:
    assert {path.stem for path in LOGITS} == {fields["model_type"] for fields in CASES.values()}
    assert sum(path.stat().st_size for path in LOGITS) < 400_000


@pytest.mark.parametrize("path", LOGITS, ids=lambda path: path.stem)
def test_float32_logits_equal_pytorch(path: Path, tmp_path: Path) -> None:
    opened, tokens, expected = load(path, tmp_path)
    assert isinstance(opened.config, DecoderConfig)
    assert opened.config.model_type == json.loads((tmp_path / "config.json").read_text())["model_type"]
    actual = np.asarray(forward(load_all(opened.source, opened.model), tokens, opened.config))
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
