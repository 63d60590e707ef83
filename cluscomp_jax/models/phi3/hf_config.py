"""Phi-3's and Phi-4's config.json <-> DecoderConfig. Knows no files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields, rope_fields
from cluscomp_jax.models.layers.rope import LongRopeConfig, longrope_attention_factor

_LONGROPE = ("longrope", "su", "yarn")
"""The names that Phi-3's configs have had for LongRoPE."""
_CONTEXT = "original_max_position_embeddings"


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    hf_fields.refuse_all_but(fields, ("partial_rotary_factor", "sliding_window"))
    sizes = hf_fields.read_sizes(fields, max_positions=4096, eps=1e-5)
    parameters = rope_fields.rope_parameters(fields)
    share = config_fields.number(fields, "partial_rotary_factor", 1.0)
    share = config_fields.number(parameters, "partial_rotary_factor", share)
    parameters.pop("partial_rotary_factor", None)
    rope_type = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    parameters["rope_type"] = "longrope" if rope_type in _LONGROPE else rope_type
    if not 0 < share <= 1:
        raise InputError(f"config: partial_rotary_factor is {share}; it must be above 0 and at most 1")
    rope = rope_fields.parse_rope(
        {**fields, _CONTEXT: config_fields.integer(fields, _CONTEXT, parameters.get(_CONTEXT, 4096))},
        parameters,
        sizes["max_position_embeddings"],
        types=("default", "longrope"),
    )
    rotary_dim = int(sizes["head_dim"] * share)
    return DecoderConfig(
        **sizes,
        layers=(LayerKind(fields.get("sliding_window"), rope),) * sizes["num_hidden_layers"],
        rotary_dim=None if rotary_dim == sizes["head_dim"] else rotary_dim,
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    rope = hf_fields.one_rope(config)
    fields = hf_fields.write_sizes(config, "Phi3ForCausalLM") | {
        "rope_theta": rope.theta,
        "rope_scaling": _scaling(rope, config.max_position_embeddings) if isinstance(rope, LongRopeConfig) else None,
        "sliding_window": hf_fields.window_of(config),
    }
    if rope.original_max_positions:
        fields[_CONTEXT] = rope.original_max_positions
    if config.rotary_dim is not None:
        fields["partial_rotary_factor"] = _share(config.rotary_dim, config.head_dim)
    return fields


def _scaling(rope: LongRopeConfig, max_positions: int) -> dict[str, Any]:
    """Returns rope_scaling; transformers 4 refuses more than type and factors, which most models need not have."""
    scaling: dict[str, Any] = {
        "type": "longrope",
        "short_factor": list(rope.short_factor),
        "long_factor": list(rope.long_factor),
    }
    factor = max_positions / rope.original_max_positions
    usual = dataclasses.replace(
        rope, factor=factor, attention_factor=longrope_attention_factor(factor, rope.original_max_positions)
    )
    return scaling if rope == usual else scaling | {"factor": rope.factor, "attention_factor": rope.attention_factor}


def _share(rotary_dim: int, head_dim: int) -> float:
    """Returns the partial_rotary_factor whose product with head_dim, rounded down, is rotary_dim."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else (rotary_dim + 0.5) / head_dim
