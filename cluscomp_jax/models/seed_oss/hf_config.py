"""Seed-OSS' config.json <-> DecoderConfig. Knows no files."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    hf_fields.refuse_all_but(fields, ("attention_bias", "attention_out_bias", "mlp_bias"))
    sizes = hf_fields.read_sizes(fields, max_positions=524288, head_dim=128, kv_heads=8)
    rope = hf_fields.read_rope(fields, sizes)
    return DecoderConfig(
        **sizes,
        layers=(LayerKind(rope=rope),) * sizes["num_hidden_layers"],
        qkv_bias=config_fields.flag(fields, "attention_bias", True),
        o_bias=config_fields.flag(fields, "attention_out_bias"),
        mlp_bias=config_fields.flag(fields, "mlp_bias"),
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    return hf_fields.write_sizes(config, "SeedOssForCausalLM") | {
        **hf_fields.write_rope(config),
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
    }
