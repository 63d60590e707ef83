"""The families of `models/decoder` live against transformers in PyTorch, float32, eager attention.

Each goes through files: transformers writes a folder, we read it, whole and cached, and our compressed copy of it
exported as dense goes back into transformers.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached_logits import cached_logits
from family_cases import CASES, fields_of

from cluscomp_jax import CalibrationConfig, ClusterConfig, CompressConfig, CompressionRule, compress, open_model
from cluscomp_jax.checkpoint.reader import open_checkpoint, save_checkpoint
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.models.decoder import forward
from cluscomp_jax.models.model import model_config_to_dict, parse_model_config
from cluscomp_jax.models.source import load_all

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 40
BOUNDS = [0, 30, 31, 34, *range(35, LENGTH + 1)]


def torch_model(fields: dict[str, Any], seed: int) -> Any:
    """Returns the PyTorch model of config fields, every parameter drawn at random so that none is idle."""
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            vector = parameter.ndim == 1
            parameter.copy_(parameter + 0.2 * noise if vector else noise / parameter.shape[-1] ** 0.5)
    return model


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


def assert_close(actual: Any, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    difference = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    print(f"largest difference {difference:.1e} of the largest logit")
    assert difference <= 1e-4


def torch_cached(model: Any, tokens: np.ndarray) -> np.ndarray:
    cache, pieces = None, []
    for start, end in itertools.pairwise(BOUNDS):
        with torch.no_grad():
            out = model(torch.from_numpy(tokens[:, start:end]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits.numpy())
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_transformers_gives_its_logits(name: str, tmp_path: Path) -> None:
    model = torch_model(fields_of(name), seed=7)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(7).integers(0, fields_of(name)["vocab_size"], (2, LENGTH))
    opened = open_model(tmp_path)
    params = load_all(opened.source, opened.model)
    assert_close(forward(params, tokens, opened.config), torch_logits(model, tokens))
    assert_close(cached_logits(opened.model, params, tokens, BOUNDS), torch_cached(model, tokens))


@pytest.mark.parametrize("name", CASES)
def test_published_fields_written_fields_and_those_of_transformers_agree(name: str) -> None:
    config = parse_model_config(fields_of(name))
    again = transformers.AutoConfig.for_model(**json.loads(json.dumps(model_config_to_dict(config)))).to_dict()
    assert parse_model_config(again) == config
    whole = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields_of(name)))).to_dict()
    assert parse_model_config(whole) == config


@pytest.mark.parametrize("name", CASES)
def test_a_dense_export_of_the_compressed_model_loads(name: str, tmp_path: Path) -> None:
    torch_model(fields_of(name), seed=3).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    opened = open_model(tmp_path / "original")
    tokens = np.random.default_rng(3).integers(0, fields_of(name)["vocab_size"], (4, 16))
    cluster = ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),), iterations=2)
    cfg = CompressConfig(
        model=opened.config, cluster=cluster, tuning=None, calibration=CalibrationConfig(samples=4, length=16)
    )
    params = compress(opened.source, cfg, calibration=tokens)
    save_checkpoint(tmp_path / "small", params, cfg)
    export_checkpoint(open_checkpoint(tmp_path / "small"), tmp_path / "dense", "dense", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "dense"), dtype=torch.float32, attn_implementation="eager"
    )
    assert_close(forward(params, tokens, opened.config), torch_logits(model, tokens))
