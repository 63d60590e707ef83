"""SmolLM3's config.json <-> DecoderConfig. Knows no files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import FULL, SLIDING, DecoderConfig
from cluscomp_jax.models.layers import config_fields

_SERVED = ("attention_bias", "mlp_bias", "no_rope_layers", "sliding_window", "use_sliding_window")


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    hf_fields.refuse_all_but(fields, _SERVED)
    sizes = hf_fields.read_sizes(fields, max_positions=32768, kv_heads=4, tied=True)
    rotated = _rotated(fields, sizes["num_hidden_layers"])
    window = fields.get("sliding_window") if config_fields.flag(fields, "use_sliding_window") else None
    default = (SLIDING if window is not None and not turns else FULL for turns in rotated)
    rope = hf_fields.read_rope(fields, sizes, theta=2e6)
    kinds = hf_fields.read_layers(fields, default, window, dict.fromkeys((FULL, SLIDING), rope))
    bias = config_fields.flag(fields, "attention_bias")
    return DecoderConfig(
        **sizes,
        layers=tuple(
            kind if turns else dataclasses.replace(kind, rope=None) for kind, turns in zip(kinds, rotated, strict=True)
        ),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config_fields.flag(fields, "mlp_bias"),
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    window = hf_fields.window_of(config)
    return hf_fields.write_sizes(config, "SmolLM3ForCausalLM") | {
        **hf_fields.write_rope(config),
        "no_rope_layers": [int(kind.rope is not None) for kind in config.layers],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": hf_fields.layer_types(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _rotated(fields: Mapping[str, Any], layers: int) -> list[bool]:
    """Returns whether each layer rotates: 1 in no_rope_layers, against that name, means that it does."""
    given = fields.get("no_rope_layers")
    if given is None:
        every = config_fields.integer(fields, "no_rope_layer_interval", 4)
        return [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(given, list | tuple) or not all(one in (0, 1) for one in given):
        raise InputError(f"config: no_rope_layers is {config_fields.short(given)}; it must be a list of 0 and 1")
    if len(given) < layers:
        raise InputError(f"config: no_rope_layers names {len(given)} layers, num_hidden_layers is {layers}")
    return [bool(one) for one in given[:layers]]
