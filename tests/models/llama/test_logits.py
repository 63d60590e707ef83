"""The decoders against PyTorch's logits, committed by scripts/make_torch_fixtures.py; needs no PyTorch."""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from paths import FIXTURES
from safetensors import safe_open

from cluscomp_jax.core import trees
from cluscomp_jax.models.llama import forward, parse_config

LOGITS = sorted((FIXTURES / "torch_logits").glob("*.safetensors"))


def load(path):
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = parse_config(json.loads(file.metadata()["config"]))
    tokens, logits = tensors.pop("tokens"), tensors.pop("logits")
    return config, trees.unflatten(tensors), tokens, logits


def test_fixtures_cover_every_family_and_rope_and_exceed_their_limits():
    configs = [load(path)[0] for path in LOGITS]
    assert {c.model_type for c in configs} == {"llama", "mistral", "qwen2", "qwen3"}
    assert {c.rope.rope_type for c in configs} == {"default", "linear", "dynamic", "llama3", "yarn"}
    length = load(LOGITS[0])[2].shape[1]
    assert all(c.sliding_window < length for c in configs if c.sliding_window)
    assert all(c.rope.original_max_positions < length for c in configs)
    assert sum(path.stat().st_size for path in LOGITS) < 600_000


@pytest.mark.parametrize("path", LOGITS, ids=lambda path: path.stem)
def test_float32_logits_equal_pytorch(path):
    config, params, tokens, expected = load(path)
    actual = forward(params, tokens, config)
    chex.assert_shape(actual, expected.shape)
    chex.assert_type(actual, jnp.float32)
    chex.assert_tree_all_finite(actual)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen2_window", "qwen3"])
def test_half_precision_stays_close_to_float32(name, dtype):
    config, params, tokens, expected = load(next(path for path in LOGITS if path.stem == name))
    actual = forward(params, tokens, config, dtype=dtype)
    chex.assert_type(actual, jnp.float32)
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 8 * float(jnp.finfo(dtype).eps)
