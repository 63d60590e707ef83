"""Ministral 3's config.json <-> DecoderConfig. Knows no files."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields, rope_fields

_BETA = "llama_4_scaling_beta"


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, rope_parameters have no llama_4_scaling_beta, or a field asks for
        a computation this family does not do.
    """
    hf_fields.refuse_all_but(fields, ("sliding_window",))
    sizes = hf_fields.read_sizes(fields, max_positions=262144, eps=1e-5, head_dim=128, kv_heads=8)
    given = rope_fields.rope_parameters(fields)
    beta = config_fields.number(given, _BETA)
    period = config_fields.integer(given, "original_max_position_embeddings", sizes["max_position_embeddings"])
    # Its own copy of the context is read by nothing.
    own = {name: value for name, value in given.items() if name not in (_BETA, "max_position_embeddings")}
    rope = rope_fields.parse_rope(fields, own, sizes["max_position_embeddings"])
    return DecoderConfig(
        **sizes,
        layers=(LayerKind(fields.get("sliding_window"), rope),) * sizes["num_hidden_layers"],
        query_scale_beta=beta,
        query_scale_period=period,
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    rope = hf_fields.one_rope(config)
    parameters = rope_fields.rope_of_layers(rope) | {
        "original_max_position_embeddings": config.query_scale_period,
        _BETA: config.query_scale_beta,
    }
    return hf_fields.write_sizes(config, "Ministral3ForCausalLM") | {
        "rope_parameters": parameters,
        "sliding_window": hf_fields.window_of(config),
    }
