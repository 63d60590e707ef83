"""The decoders live against transformers in PyTorch, float32, eager attention: every family, rope type and window."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
from cached_logits import cached_logits
from script_modules import load_script

from cluscomp_jax.core import trees
from cluscomp_jax.models.llama import build, forward, parse_config, to_hf_dict

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

fixtures = load_script("make_torch_fixtures")

MIDDLE = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
LENGTH = 150


def setup(name, seed):
    fields = MIDDLE | fixtures.CASES[name]
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"] * 2
    model = fixtures.torch_model(fields, seed)
    config = parse_config(fixtures.config_json(model))
    ids = {"bos_token_id": None, "eos_token_id": (), "pad_token_id": None}
    assert parse_config(fields) == dataclasses.replace(config, **ids)
    assert parse_config(transformers.AutoConfig.for_model(**to_hf_dict(config)).to_dict()) == config
    tokens = np.random.default_rng(seed).integers(0, MIDDLE["vocab_size"], (2, LENGTH))
    return model, config, trees.unflatten(fixtures.our_layout(model)), tokens


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", fixtures.CASES)
def test_forward_and_cached_decoding(name):
    model, config, params, tokens = setup(name, 11)
    unused = copy.deepcopy(model)  # transformers' dynamic rope remembers the longest sequence it has seen
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    assert_close(forward(params, tokens, config), expected)

    bounds = [0, 130, 131, 140, *range(141, LENGTH + 1)]
    cache, pieces = None, []
    for start, end in itertools.pairwise(bounds):
        with torch.no_grad():
            out = unused(torch.from_numpy(tokens[:, start:end]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits.numpy())
    assert_close(cached_logits(build(config), params, tokens, bounds), np.concatenate(pieces, axis=1))


@pytest.mark.parametrize("seed", range(3))
def test_plain_configs_of_every_family(seed):
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 4)) * 2
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        fields = MIDDLE | {
            "model_type": family,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "hidden_size": heads * 8,
            "num_hidden_layers": 1,
        }
        model = fixtures.torch_model(fields, seed)
        tokens = rng.integers(0, MIDDLE["vocab_size"], (1, 9))
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)).logits.numpy()
        config = parse_config(fixtures.config_json(model))
        assert_close(forward(trees.unflatten(fixtures.our_layout(model)), tokens, config), expected)
