"""The config.json of Gemma 2 and Gemma 3 (gemma3_text) <-> DecoderConfig. Knows no files.

Where the fields of both have the same name, their defaults differ.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import FULL, SLIDING, DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields

_SERVED = (
    "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "rope_local_base_freq", "sliding_window", "sliding_window_pattern",
)  # fmt: skip
_ONLY_GEMMA3 = ("rope_local_base_freq", "sliding_window_pattern")
_ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
_SOFTCAPS: dict[str, dict[str, float | None]] = {
    "gemma2": {"attention_softcap": 50.0, "logits_softcap": 30.0},
    "gemma3_text": {"attention_softcap": None, "logits_softcap": None},
}
_CAP_FIELDS = {"attention_softcap": "attn_logit_softcapping", "logits_softcap": "final_logit_softcapping"}


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    model_type = str(fields.get("model_type"))
    third = model_type == "gemma3_text"
    hf_fields.refuse_all_but(fields, [name for name in _SERVED if third or name not in _ONLY_GEMMA3])
    sizes = hf_fields.read_sizes(
        fields,
        max_positions=131072 if third else 8192,
        head_dim=256,
        kv_heads=4,
        tied=True,
        activation="hidden_activation",
        activation_default="gelu_pytorch_tanh",
    )
    bias = config_fields.flag(fields, "attention_bias")
    for switch, default in _SOFTCAPS[model_type].items():
        sizes[switch] = config_fields.optional_number(fields, _CAP_FIELDS[switch], default)
    if third:
        sizes["attention_softcap"] = None  # the field is there, and attention never applies it
    scalar = config_fields.number(fields, "query_pre_attn_scalar", 256.0)
    return DecoderConfig(
        **sizes,
        layers=_layers_of_3(fields, sizes) if third else _layers_of_2(fields, sizes),
        norms="sandwich",
        norm_weight="offset",
        qk_norm="head" if third else "none",
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=scalar**-0.5,
        embedding_multiplier=sizes["hidden_size"] ** 0.5,
        extra=(("query_pre_attn_scalar", int(scalar) if scalar.is_integer() else scalar),),
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    third = config.model_type == "gemma3_text"
    fields = hf_fields.write_sizes(config, _ARCHITECTURES[config.model_type], activation="hidden_activation")
    fields |= {name: getattr(config, switch) for switch, name in _CAP_FIELDS.items()}
    fields |= dict(config.extra) | {
        "attention_bias": config.qkv_bias,
        "sliding_window": hf_fields.some_window(config),
        "layer_types": hf_fields.layer_types(config),
    }
    if third:
        return fields | {"rope_parameters": hf_fields.ropes_by_type(config)}
    return fields | hf_fields.write_rope(config)


def _layers_of_2(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    rope = hf_fields.read_rope(fields, sizes)
    default = _every(2, sizes["num_hidden_layers"])
    return hf_fields.read_layers(
        fields, default, fields.get("sliding_window", 4096), dict.fromkeys((FULL, SLIDING), rope)
    )


def _layers_of_3(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    ropes = hf_fields.read_ropes(
        fields,
        sizes["max_position_embeddings"],
        theta={FULL: 1e6, SLIDING: 1e4},
        local_theta="rope_local_base_freq",
    )
    default = _every(config_fields.integer(fields, "sliding_window_pattern", 6), sizes["num_hidden_layers"])
    return hf_fields.read_layers(fields, default, fields.get("sliding_window", 4096), ropes)


def _every(period: int, layers: int) -> Iterable[str]:
    """Yields the types of layers of which the last of each `period` is full."""
    return (FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))
