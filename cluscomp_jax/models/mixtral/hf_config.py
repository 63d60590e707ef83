"""Mixtral's config.json <-> DecoderConfig. Knows no files."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.decoder.experts import ExpertsConfig
from cluscomp_jax.models.layers import config_fields


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    hf_fields.refuse_all_but(fields, ("num_local_experts", "sliding_window"))
    sizes = hf_fields.read_sizes(fields, max_positions=4096 * 32, eps=1e-5, kv_heads=8)
    rope = hf_fields.read_rope(fields, sizes, theta=1e6)
    return DecoderConfig(
        **sizes,
        layers=(LayerKind(fields.get("sliding_window"), rope),) * sizes["num_hidden_layers"],
        experts=ExpertsConfig(
            config_fields.integer(fields, "num_local_experts", 8),
            config_fields.integer(fields, "num_experts_per_tok", 2),
        ),
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    assert config.experts is not None
    return hf_fields.write_sizes(config, "MixtralForCausalLM") | {
        **hf_fields.write_rope(config),
        "head_dim": config.head_dim,
        "sliding_window": hf_fields.window_of(config),
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_position,
    }
