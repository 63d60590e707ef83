"""LlamaConfig.of reads the configs of other libraries by the names of their attributes."""

import dataclasses
import enum
from types import SimpleNamespace

import pytest

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.models.llama import LlamaConfig, to_hf_dict

SIZES = {
    "vocab_size": 24, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
HF = LlamaConfig(**SIZES, rope=RopeConfig(theta=500.0), rms_norm_eps=1e-5)
TUNIX = {
    "num_layers": 2, "vocab_size": 24, "embed_dim": 12, "hidden_dim": 20, "num_heads": 4, "head_dim": 6,
    "num_kv_heads": 2, "rope_theta": 500, "norm_eps": 1e-5,
}  # fmt: skip
BONSAI = {
    "num_layers": 2, "vocab_size": 24, "emb_dim": 12, "mlp_dim": 20, "num_heads": 4, "head_dim": 6, "num_kv_heads": 2,
    "rope_theta": 500, "norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
MAXTEXT = {
    "vocab_size": 24, "emb_dim": 12, "mlp_dim": 20, "num_decoder_layers": 2, "num_query_heads": 4, "num_kv_heads": 2,
    "head_dim": 6, "normalization_layer_epsilon": 1e-5, "rope_max_timescale": 500, "rope_min_timescale": 1,
    "rope_type": "default", "rope_use_scale": True, "decoder_block": "llama2", "use_qk_norm": False,
    "attention_bias": False, "logits_via_embedding": False, "normalize_embedding_logits": True,
    "mlp_activations": ["silu", "linear"], "num_experts": 1, "final_logits_soft_cap": 0.0, "model_name": "llama2-7b",
}  # fmt: skip
LLAMA31 = RopeConfig(rope_type="llama3", theta=500.0, factor=8.0, original_max_positions=8192)


class Block(enum.Enum):
    QWEN3 = "qwen3"


class RopeType(enum.StrEnum):
    LLAMA31 = "llama3.1"


def of(fields, **changes):
    return LlamaConfig.of(SimpleNamespace(**(fields | changes)))


def changed(**changes):
    return dataclasses.replace(HF, layer_types=(), **changes)


def test_our_own_and_a_dict_of_hugging_face():
    assert LlamaConfig.of(HF) is HF
    assert LlamaConfig.of(to_hf_dict(HF)) == HF
    assert LlamaConfig.of(SimpleNamespace(to_dict=lambda: to_hf_dict(HF))) == HF


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"weight_tying": False}, {}),
        ({"weight_tying": True}, {"tie_word_embeddings": True}),
        ({"use_tied_embedding": True}, {"model_type": "qwen2", "tie_word_embeddings": True}),
        ({"use_tied_embedding": False, "num_experts": None}, {"model_type": "qwen3"}),
    ],
)
def test_tunix(extra, expected):
    assert of(TUNIX, **extra) == changed(**expected)


def test_bonsai():
    assert of(BONSAI) == changed(model_type="qwen3", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, {}),
        ({"model_name": "llama3.1-8b"}, {"rope": LLAMA31}),
        ({"rope_type": "llama3.1"}, {"rope": LLAMA31}),
        ({"rope_type": RopeType.LLAMA31}, {"rope": LLAMA31}),
        ({"decoder_block": "mistral"}, {"model_type": "mistral"}),
        ({"decoder_block": "qwen2", "attention_bias": True}, {"model_type": "qwen2"}),
        (
            {
                "decoder_block": Block.QWEN3,
                "use_qk_norm": True,
                "logits_via_embedding": True,
                "normalize_embedding_logits": False,
            },
            {"model_type": "qwen3", "tie_word_embeddings": True},
        ),
    ],
)
def test_maxtext(extra, expected):
    assert of(MAXTEXT, **extra) == changed(**expected)


@pytest.mark.parametrize(
    ("fields", "extra", "part"),
    [
        (MAXTEXT, {"decoder_block": "gemma"}, "decoder_block is 'gemma'"),
        (MAXTEXT, {"num_experts": 8}, "num_experts is 8"),
        (MAXTEXT, {"sliding_window_size": 4}, "sliding_window_size is 4"),
        (MAXTEXT, {"use_qk_norm": True}, "use_qk_norm is True with decoder_block 'llama2'"),
        (MAXTEXT, {"attention_bias": True}, "attention_bias is True"),
        (MAXTEXT, {"logits_via_embedding": True}, "normalize_embedding_logits is true"),
        (MAXTEXT, {"mlp_activations": ["gelu", "linear"]}, "mlp_activations is ('gelu', 'linear')"),
        (MAXTEXT, {"rope_type": "yarn"}, "rope_type is 'yarn'"),
        (MAXTEXT, {"rope_type": "llama3.1", "rope_use_scale": False}, "rope_use_scale is false"),
        (TUNIX, {"num_experts": 8}, "num_experts is 8"),
        ({"layers": 3}, {}, "a SimpleNamespace is no config that is known"),
    ],
)
def test_what_is_not_served_is_named(fields, extra, part):
    with pytest.raises(InputError) as error:
        of(fields, **extra)
    assert part in str(error.value)
