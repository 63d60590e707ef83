"""Granite's config.json <-> DecoderConfig. Knows no files."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields

_MULTIPLIERS = {
    "embedding_multiplier": "embedding_multiplier",
    "logits_scaling": "logits_divisor",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_scale",
}
"""{field of config.json: switch}; all are 1.0 where the config gives none."""


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    hf_fields.refuse_all_but(fields, ("attention_bias", "mlp_bias", *_MULTIPLIERS))
    sizes = hf_fields.read_sizes(fields)
    rope = hf_fields.read_rope(fields, sizes)
    sizes |= {switch: config_fields.number(fields, name, 1.0) for name, switch in _MULTIPLIERS.items()}
    bias = config_fields.flag(fields, "attention_bias")
    return DecoderConfig(
        **sizes,
        layers=(LayerKind(rope=rope),) * sizes["num_hidden_layers"],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config_fields.flag(fields, "mlp_bias"),
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    return hf_fields.write_sizes(config, "GraniteForCausalLM") | {
        **{name: getattr(config, switch) for name, switch in _MULTIPLIERS.items()},
        **hf_fields.write_rope(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
