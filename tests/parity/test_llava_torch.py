"""LLaVA and LLaVA-Next of transformers: text model compressed, the whole exported, the same logits in PyTorch."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from vlm_models import TRANSFORMERS_5, read_raw, write_raw

from cluscomp_jax import CompressConfig, CompressionRule, compress, open_model, save_checkpoint
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.models.model import parse_model_config
from cluscomp_jax.models.source import as_source

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch_vlms  # noqa: E402  it imports both

CASES = [(outer, inner) for outer in ("llava", "llava_next") for inner in ("llama", "mistral", "qwen2")]
SHARE = 1e-4
"""Logits may differ by this share of the largest."""


def close(found: np.ndarray, want: np.ndarray) -> None:
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= SHARE * np.abs(want).max()


def ours(params: Any, model: Any, x: np.ndarray) -> np.ndarray:
    """Our logits of what the first block reads, straight through the model's functions."""
    source = as_source(params, model)
    y = jnp.asarray(x)
    for i in range(model.num_blocks):
        y = model.block(source.load_block(i), y, layer_type=model.layer_type(i))
    return np.asarray(model.head(source.load_outer(), y))


def load(folder: Path) -> Any:
    model = transformers.AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32)
    return model.eval()


def renamed(folder: Path) -> None:
    """Gives a folder the names that the modules have since transformers 4.52."""

    def name(stored: str) -> str:
        plain = stored.removeprefix("language_model.")
        if plain == stored:
            return f"model.{stored}"
        prefix = next(prefix for prefix in TRANSFORMERS_5 if plain.startswith(prefix))
        return TRANSFORMERS_5[prefix] + plain.removeprefix(prefix)

    tensors = read_raw(folder / "model.safetensors")
    write_raw(folder / "model.safetensors", {name(stored): tensor for stored, tensor in tensors.items()})


@pytest.mark.parametrize("names", ["language_model.", "model.language_model."])
@pytest.mark.parametrize(("model_type", "family"), CASES)
def test_logits_of_image_and_text(tmp_path: Path, model_type: str, family: str, names: str) -> None:
    original, processor = torch_vlms.write_model(tmp_path / "vlm", model_type, family)
    if names == "model.language_model.":
        renamed(tmp_path / "vlm")
    image = torch_vlms.make_image(0)
    inputs = processor(images=image, text="look: <image> what is in it", return_tensors="pt")
    logits, x = torch_vlms.captured(original, inputs)
    opened = open_model(tmp_path / "vlm")
    assert opened.config.model_type == family
    assert opened.carried is not None
    cfg = CompressConfig(
        model=opened.config, cluster=ClusterConfig(rules=(CompressionRule(group_size=2, num_codes=64),)), tuning=None
    )
    close(ours(opened.source, opened.model, x), logits)

    # Before compression, through our dense export.
    write = opened.carried.write
    save_checkpoint(tmp_path / "same", opened.source, cfg, carried=write)
    export_checkpoint(open_checkpoint(tmp_path / "same"), tmp_path / "dense", "dense")
    close(torch_vlms.captured(load(tmp_path / "dense"), inputs)[0], logits)
    again = transformers.AutoProcessor.from_pretrained(str(tmp_path / "dense"))
    for name, value in again(images=image, text="look: <image> what is in it", return_tensors="pt").items():
        assert torch.equal(value, inputs[name])

    # The compressed model against the decoded one.
    params = compress(opened.source, cfg)
    assert any(isinstance(leaf, CodebookArray) for leaf in trees.flatten(params).values())
    save_checkpoint(tmp_path / "small", params, cfg, carried=write)
    export_checkpoint(open_checkpoint(tmp_path / "small"), tmp_path / "decoded", "dense")
    decoded, seen = torch_vlms.captured(load(tmp_path / "decoded"), inputs)
    np.testing.assert_array_equal(seen, x)
    close(ours(params, opened.model, x), decoded)
    assert np.abs(decoded - logits).max() > SHARE * np.abs(logits).max()

    # Whatever is outside the text model has the bytes of the original.
    want = read_raw(tmp_path / "vlm/model.safetensors")
    outside = {name for name in want if "language_model." not in name and "lm_head." not in name}
    assert any("vision_tower" in name for name in outside)
    assert any("multi_modal_projector" in name for name in outside)
    assert any("image_newline" in name for name in outside) is (model_type == "llava_next")
    for folder in ("dense", "decoded"):
        found = read_raw(tmp_path / folder / "model.safetensors")
        assert found.keys() == want.keys()
        assert {name: found[name] for name in outside} == {name: want[name] for name in outside}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_sizes_left_out_are_those_of_transformers(model_type: str, family: str) -> None:
    text = {"model_type": family}
    whole = transformers.AutoConfig.for_model(
        model_type, text_config=text, vision_config={"model_type": "clip_vision_model"}
    )
    fields = whole.text_config.to_dict()
    assert parse_model_config({"model_type": model_type, "text_config": text}) == parse_model_config(
        {"model_type": model_type, "text_config": {**fields, "bos_token_id": None, "eos_token_id": None}}
    )
