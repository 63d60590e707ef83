"""Granite 4's config.json (granitemoehybrid) without experts and Mamba layers <-> DecoderConfig. Knows no files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder.config import DecoderConfig
from cluscomp_jax.models.granite import hf_config as granite
from cluscomp_jax.models.layers import config_fields

_ATTENTION = ("attention", "full_attention")
_INNER = "shared_intermediate_size"
_UNUSED: dict[str, int] = {
    "intermediate_size": 11008,
    "mamba_chunk_size": 256,
    "mamba_d_conv": 4,
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "num_experts_per_tok": 2,
}
"""Fields of the parts that a dense model has not, with their defaults; transformers checks them against one another."""


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: it has experts or Mamba layers, or what Granite's reader refuses.
    """
    experts = config_fields.integer(fields, "num_local_experts", 8, least=0)
    if experts:
        raise InputError(f"config: num_local_experts is {experts}, which is not supported; only 0 is")
    types = config_fields.texts(fields, "layer_types")
    if types is None or any(kind not in _ATTENTION for kind in types):
        shown = config_fields.short(fields.get("layer_types"))
        raise InputError(f"config: layer_types is {shown}; only layers of 'attention' are supported")
    layers = config_fields.integer(fields, "num_hidden_layers")
    if len(types) != layers:
        raise InputError(f"config: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    place = fields.get("position_embedding_type")
    if place not in (None, "rope", "nope"):
        raise InputError(
            f"config: position_embedding_type is {config_fields.short(place)}, which is not supported; supported: "
            "rope, nope"
        )
    plain = {name: value for name, value in fields.items() if name not in ("layer_types", "num_local_experts")}
    found = granite.parse_config(plain | {"intermediate_size": config_fields.integer(fields, _INNER, 1024)})
    kinds = found.layers if place == "rope" else tuple(dataclasses.replace(kind, rope=None) for kind in found.layers)
    unused = tuple((name, config_fields.integer(fields, name, value, least=0)) for name, value in _UNUSED.items())
    return dataclasses.replace(found, layers=kinds, extra=unused)


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    rotates = config.layers[0].rope is not None
    return granite.to_hf_dict(config) | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **dict(config.extra),
        _INNER: config.intermediate_size,
        "layer_types": ["attention"] * config.num_hidden_layers,
        "num_local_experts": 0,
        "position_embedding_type": "rope" if rotates else "nope",
    }
