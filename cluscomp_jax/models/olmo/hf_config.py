"""The config.json of OLMo 2 and OLMo 3 <-> DecoderConfig. Knows no files."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import FULL, SLIDING, DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields

_SLIDING_OF_4 = 3


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    windowed = fields.get("model_type") == "olmo3"
    hf_fields.refuse_all_but(fields, ("attention_bias", "sliding_window") if windowed else ("attention_bias",))
    sizes = hf_fields.read_sizes(fields, eps=1e-5)
    bias = config_fields.flag(fields, "attention_bias")
    return DecoderConfig(
        **sizes,
        layers=_windowed(fields, sizes) if windowed else _full(fields, sizes),
        norms="post",
        norm_weight="float32",
        qk_norm="projection",
        qkv_bias=bias,
        o_bias=bias,
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    windowed = config.model_type == "olmo3"
    fields = hf_fields.write_sizes(config, "Olmo3ForCausalLM" if windowed else "Olmo2ForCausalLM")
    fields["attention_bias"] = config.qkv_bias
    if not windowed:
        return fields | hf_fields.write_rope(config)
    return fields | {
        "rope_parameters": hf_fields.ropes_by_type(config),
        "sliding_window": hf_fields.some_window(config),
        "layer_types": hf_fields.layer_types(config),
    }


def _full(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    rope = hf_fields.read_rope(fields, sizes)
    return (LayerKind(rope=rope),) * sizes["num_hidden_layers"]


def _windowed(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    layers = sizes["num_hidden_layers"]
    default = (SLIDING if i % 4 < _SLIDING_OF_4 else FULL for i in range(layers))
    ropes = hf_fields.read_ropes(fields, sizes["max_position_embeddings"], theta={FULL: 5e5, SLIDING: 5e5})
    return hf_fields.read_layers(fields, default, fields.get("sliding_window", 4096), ropes)
