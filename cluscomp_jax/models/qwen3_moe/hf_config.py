"""Qwen3-MoE's config.json <-> DecoderConfig. Knows no files."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.decoder.experts import ExpertsConfig
from cluscomp_jax.models.layers import config_fields


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do, such as
        layers without experts.
    """
    windowed = config_fields.flag(fields, "use_sliding_window")
    hf_fields.refuse_all_but(
        fields, ("attention_bias", "num_experts", "num_local_experts", "sliding_window", "use_sliding_window")
    )
    own = {**fields, "intermediate_size": config_fields.integer(fields, "moe_intermediate_size", 768)}
    sizes = hf_fields.read_sizes(own, max_positions=32768, kv_heads=4)
    rope = hf_fields.read_rope(fields, sizes)
    window = fields.get("sliding_window", 4096) if windowed else None
    bias = config_fields.flag(fields, "attention_bias")
    count = config_fields.integer(fields, "num_local_experts", 128)
    return DecoderConfig(
        **sizes,
        layers=(LayerKind(window, rope),) * sizes["num_hidden_layers"],
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        experts=ExpertsConfig(
            config_fields.integer(fields, "num_experts", count),
            config_fields.integer(fields, "num_experts_per_tok", 8),
            config_fields.flag(fields, "norm_topk_prob"),
        ),
        extra=(("intermediate_size", config_fields.integer(fields, "intermediate_size", 6144)),),
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    assert config.experts is not None
    window = hf_fields.window_of(config)
    return hf_fields.write_sizes(config, "Qwen3MoeForCausalLM") | {
        **hf_fields.write_rope(config),
        **dict(config.extra),
        "moe_intermediate_size": config.intermediate_size,
        "attention_bias": config.qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_position,
        "norm_topk_prob": config.experts.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
