"""A family that this package does not know: registered by its user, and served from config.json to generated tokens."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from safetensors.numpy import save_file

from cluscomp_jax import (
    CalibrationConfig,
    ClusterConfig,
    CompressConfig,
    CompressionRule,
    compress,
    generate,
    open_model,
)
from cluscomp_jax.checkpoint.reader import open_checkpoint, save_checkpoint
from cluscomp_jax.errors import InputError
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.models.decoder import DecoderConfig, LayerKind, build, forward
from cluscomp_jax.models.decoder.hf_fields import read_sizes, write_sizes
from cluscomp_jax.models.decoder.names import hugging_face_names
from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.models.model import model_config_to_dict, parameter_shapes, parse_model_config, register_family
from cluscomp_jax.models.source import load_all
from cluscomp_jax.models.tensor_names import names_of

FIELDS = {
    "model_type": "toy_sandwich",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "window": 4,
}


def parse_config(fields: Any) -> DecoderConfig:
    kinds = [LayerKind(fields["window"] if i % 2 else None, RopeConfig(theta=500.0)) for i in range(3)]
    return DecoderConfig(**read_sizes(fields), layers=tuple(kinds), norms="sandwich", embedding_multiplier=2.0)


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    return write_sizes(config, "ToyForCausalLM") | {"window": config.window(1)}


NAMES = hugging_face_names(
    renamed={"pre_feedforward_layernorm": "mid_norm"}, fused={"mlp.gate_up": ("mlp/gate_proj", "mlp/up_proj")}
)
register_family(
    "toy_sandwich",
    SimpleNamespace(
        parse_config=parse_config, to_hf_dict=to_hf_dict, build=build, TENSOR_NAMES={"hugging_face": NAMES}
    ),
)


@pytest.fixture(name="folder")
def make_folder(tmp_path: Any) -> Any:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(build(parse_config(FIELDS)))
    tensors = {}
    for path in shapes:
        paths = NAMES.paths(NAMES.name(path))
        if path == paths[0]:
            parts = [0.3 * rng.standard_normal(shapes[one][::-1] if "kernel" in one else shapes[one]) for one in paths]
            tensors[NAMES.name(path)] = np.concatenate(parts).astype(np.float32)
    assert "model.layers.1.mid_norm.weight" in tensors
    assert tensors["model.layers.0.mlp.gate_up.weight"].shape == (48, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


def test_it_is_compressed_saved_exported_and_run(folder: Any) -> None:
    opened = open_model(folder)
    tokens = np.random.default_rng(1).integers(0, 40, (4, 12))
    cfg = CompressConfig(
        model=opened.config,
        cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),), iterations=2, error_feedback=False),
        tuning=None,
        calibration=CalibrationConfig(samples=4, length=12),
    )
    small = compress(opened.source, cfg, calibration=tokens)
    save_checkpoint(folder / "small", small, cfg)
    export_checkpoint(open_checkpoint(folder / "small"), folder / "dense", "dense", dtype="float32")
    with pytest.raises(InputError, match="toy_sandwich stores several matrices as one"):
        export_checkpoint(open_checkpoint(folder / "small"), folder / "aqlm", "aqlm")
    again = open_model(folder / "dense")
    assert again.config == opened.config
    expected = np.asarray(forward(small, tokens, opened.config))
    found = np.asarray(forward(load_all(again.source, again.model), tokens, again.config))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    prompt = tokens[0, :5]
    drawn = generate(small, prompt, opened.config, max_new_tokens=4)
    row = np.concatenate([prompt, drawn])[None]
    whole = np.asarray(forward(small, row, opened.config))[0]
    np.testing.assert_array_equal(whole[4:-1].argmax(-1), drawn)


def test_the_code_of_the_page_runs() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    exec(page.split("```python\n", 1)[1].split("```", 1)[0], {})
    config = parse_model_config(FIELDS | {"model_type": "my_family"})
    assert parse_model_config(model_config_to_dict(config)) == config
    assert names_of(config, "hugging_face").fused == {"mlp.gate_up": ("mlp/gate_proj", "mlp/up_proj")}
