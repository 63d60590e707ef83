"""Gemma 3 with its vision tower, as transformers saves it: logits of text, and the export, against PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vlm_models import read_raw

from cluscomp_jax import CompressConfig, CompressionRule, compress, open_model, save_checkpoint
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.models.decoder import forward
from cluscomp_jax.models.model import parse_model_config
from cluscomp_jax.models.source import load_all

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARE = 1e-4
"""Logits may differ by this share of the largest."""
TOKENS = np.random.default_rng(0).integers(6, 64, (2, 24))


def write_model(folder: Path) -> Any:
    text = transformers.Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        sliding_window_pattern=2,
        max_position_embeddings=256,
        query_pre_attn_scalar=8,
        initializer_range=0.2,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=3,
        eoi_token_index=4,
        image_token_index=5,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor(TOKENS)).logits)


def close(found: Any, want: np.ndarray) -> None:
    assert found.shape == want.shape
    assert np.abs(np.asarray(found) - want).max() <= SHARE * np.abs(want).max()


def test_logits_of_text_and_the_bytes_around_it(tmp_path: Path) -> None:
    original = write_model(tmp_path / "gemma")
    opened = open_model(tmp_path / "gemma")
    assert opened.config.model_type == "gemma3_text"
    assert opened.carried is not None
    close(forward(load_all(opened.source, opened.model), TOKENS, opened.config), torch_logits(original))
    cluster = ClusterConfig(rules=(CompressionRule(group_size=2, num_codes=64),))
    cfg = CompressConfig(model=opened.config, cluster=cluster, tuning=None)
    params = compress(opened.source, cfg)
    save_checkpoint(tmp_path / "small", params, cfg, carried=opened.carried.write)
    export_checkpoint(open_checkpoint(tmp_path / "small"), tmp_path / "dense", "dense")
    decoded = transformers.AutoModelForImageTextToText.from_pretrained(str(tmp_path / "dense"), dtype=torch.float32)
    close(forward(params, TOKENS, opened.config), torch_logits(decoded.eval()))
    want, found = (read_raw(tmp_path / folder / "model.safetensors") for folder in ("gemma", "dense"))
    assert found.keys() == want.keys()
    outside = {name for name in want if not name.startswith("language_model.")}
    assert any(name.startswith("vision_tower.") for name in outside)
    assert {name: found[name] for name in outside} == {name: want[name] for name in outside}


def test_the_fields_that_hubs_leave_out_are_those_of_transformers() -> None:
    text = {  # all that the config.json of gemma-3-4b-it says of its text model
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    whole = transformers.AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={"model_type": "siglip_vision_model"}
    )
    fields = whole.text_config.to_dict() | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    assert parse_model_config({"model_type": "gemma3", "text_config": text}) == parse_model_config(
        {"model_type": "gemma3", "text_config": fields}
    )
