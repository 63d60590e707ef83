"""config.json mappings: real families in both styles, the way back, and every refusal by name."""

import dataclasses
import json

import pytest

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.llama import LlamaConfig, RopeConfig, parse_config, to_hf_dict
from cluscomp_jax.models.model import build_model, parse_model_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def fields(model_type="llama", **changes):
    return {"model_type": model_type, **SIZES, **changes}


def test_a_published_config_is_read_whole():
    config = parse_config(SMOLLM2_135M)
    assert config == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope=RopeConfig(theta=100000.0),
        initializer_range=0.041666666666666664,
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=2,
    )
    assert parse_model_config(SMOLLM2_135M) == config
    assert build_model(config).num_blocks == 30


def test_absent_fields_take_the_defaults_of_each_family():
    plain = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    llama, mistral, qwen2, qwen3 = (
        parse_config({"model_type": name, **plain, "num_attention_heads": 8})
        for name in ("llama", "mistral", "qwen2", "qwen3")
    )
    assert [c.num_key_value_heads for c in (llama, mistral, qwen2, qwen3)] == [8, 8, 8, 8]
    assert [c.head_dim for c in (llama, mistral, qwen2, qwen3)] == [4, 4, 4, 128]
    assert [c.window(0) for c in (llama, mistral, qwen2, qwen3)] == [None, 4096, None, None]
    assert [c.qkv_bias for c in (llama, mistral, qwen2, qwen3)] == [False, False, True, False]
    assert [c.qk_norm for c in (llama, mistral, qwen2, qwen3)] == [False, False, False, True]
    assert [c.max_position_embeddings for c in (llama, mistral, qwen2, qwen3)] == [2048, 131072, 32768, 32768]


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3,
        YARN,
        {**YARN, "beta_fast": 16, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "finetuned": True},
    ],
    ids=lambda scaling: scaling.get("type", scaling.get("rope_type")),
)
def test_transformers_4_and_5_styles_say_the_same(scaling):
    four = fields(rope_theta=5e5, rope_scaling=scaling)
    parameters = {**scaling, "rope_type": scaling.get("type", scaling.get("rope_type")), "rope_theta": 5e5}
    five = fields(rope_parameters=parameters)
    config = parse_config(four)
    assert config.rope.theta == 5e5
    assert config.rope.factor == scaling["factor"]
    assert parse_config(five) == config
    assert parse_config(json.loads(json.dumps(to_hf_dict(config)))) == config


def test_yarn_defaults_come_from_the_context_lengths():
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    rope = parse_config(fields(max_position_embeddings=4096, rope_scaling=scaling)).rope
    assert rope.factor == 4.0
    assert rope.attention_factor == pytest.approx(1.1386294)
    given = {**YARN, "attention_factor": 1.5}
    assert parse_config(fields(rope_scaling=given)).rope.attention_factor == 1.5


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, [None] * 4),
        ({"use_sliding_window": False, "sliding_window": 8}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, [None, None, None, 8]),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, [8] * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, [None] * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [8, None, 8, None],
        ),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows(family, changes, windows):
    config = parse_config(fields(family, **changes))
    assert [config.window(i) for i in range(4)] == windows
    assert parse_config(to_hf_dict(config)) == config


@pytest.mark.parametrize(
    "given",
    [
        fields(eos_token_id=[1, 2], head_dim=6, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
        fields("mistral", sliding_window=None),
        fields("mistral", sliding_window=16),
        fields("qwen3", attention_bias=True, tie_word_embeddings=True),
        SMOLLM2_135M,
    ],
)
def test_the_way_back_is_exact_and_json(given):
    config = parse_config(given)
    assert parse_config(json.loads(json.dumps(to_hf_dict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None}, "model_type None"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0"),
        ({"hidden_size": 2**40, "head_dim": 8}, "hidden_size is 1099511627776"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 3, "head_dim": 8}, "num_attention_heads is 3 and num_key_value_heads 2"),
        ({"num_attention_heads": 6}, "hidden_size 32 is no multiple of num_attention_heads 6"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "head_dim is 2"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_act": 3}, "hidden_act is 3"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"bos_token_id": [1, 2]}, "bos_token_id is"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"sliding_window": 16}, "sliding_window is 16"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mistral", "sliding_window": "8"}, "sliding_window is '8'"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is true"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is true"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention'"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "sliding_window is not set"),
        ({"rope_scaling": 4}, "rope_scaling is 4"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope type \\['linear'\\]"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope factor is 0.0"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "rope factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "does not read 'mrope_section'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope type 'default' does not read 'factor'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0 and high_freq_factor 4.0"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": YARN, "rope_parameters": LLAMA3}, "rope_scaling and rope_parameters"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "does not read 'full_attention'"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"rope_theta": 0}, "rope theta is 0.0"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_config(fields() | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"sliding_window": 4}, "llama has no windows"),
        (
            {"model_type": "mistral", "sliding_window": 4, "layer_types": ("full_attention", "sliding_attention")},
            "layer_types differ",
        ),
    ],
)
def test_a_config_made_by_hand_is_checked_too(changes, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig(**{**SIZES, "head_dim": 8, "num_hidden_layers": 2, **changes})


def test_configs_are_frozen_and_hashable():
    config = parse_config(SMOLLM2_135M)
    assert hash(config) == hash(parse_config(SMOLLM2_135M))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
