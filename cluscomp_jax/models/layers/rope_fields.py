"""Rotary embeddings in config.json <-> RopeConfig, transformers 4 style (rope_theta, rope_scaling) and 5
(rope_parameters). Knows no family: which types one serves and where it has their fields, the family says.
"""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layers import config_fields
from cluscomp_jax.models.layers.rope import (
    ROPE_TYPES,
    LongRopeConfig,
    RopeConfig,
    longrope_attention_factor,
    yarn_attention_factor,
)

_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor"),
}
# Read elsewhere, or written by converters and read by no implementation.
_ROPE_KEYS_OF_ALL = ("type", "rope_type", "rope_theta", "original_max_position_embeddings", "finetuned")


def rope_parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rope_scaling or rope_parameters, whichever is there, without its null entries.

    Raises:
      InputError: it is no mapping, or both are given and differ.
    """
    found = {name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name)}
    for name, value in found.items():
        if not isinstance(value, Mapping):
            raise InputError(f"config: {name} is {config_fields.short(value)}; it must be a mapping or null")
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise InputError("config: rope_scaling and rope_parameters are both given and differ; keep one of them")
    return {name: value for name, value in next(iter(found.values()), {}).items() if value is not None}


def parse_rope(
    fields: Mapping[str, Any],
    parameters: Mapping[str, Any],
    max_positions: int,
    *,
    types: tuple[str, ...] = ROPE_TYPES,
    theta: float = 10000.0,
) -> RopeConfig:
    """Returns the RopeConfig of a config.

    Args:
      fields: the whole config; rope_theta and original_max_position_embeddings are read where they are given in it.
      parameters: of `rope_parameters`, or its part for one kind of layer.
      max_positions: max_position_embeddings.
      types: the rope types that the family serves.
      theta: the base where the config gives none.

    Raises:
      InputError: another type, a key that the type does not read, or a number out of range.
    """
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in types:
        raise InputError(
            f"config: rope type {config_fields.short(rope_type)} is not supported; supported: {', '.join(types)}"
        )
    unknown = sorted(set(parameters) - {*_ROPE_KEYS_OF_ALL, *_ROPE_KEYS[rope_type]})
    if unknown:
        raise InputError(
            f"config: rope type {rope_type!r} does not read {unknown[0]!r}; remove it if it has no meaning"
        )
    theta = config_fields.number(parameters, "rope_theta", config_fields.number(fields, "rope_theta", theta))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type in ("linear", "dynamic"):
        original = max_positions if rope_type == "dynamic" else 0
        factor = config_fields.number(parameters, "factor")
        return RopeConfig(rope_type=rope_type, theta=theta, factor=factor, original_max_positions=original)
    inner = config_fields.integer(parameters, "original_max_position_embeddings", max_positions)
    original = config_fields.integer(fields, "original_max_position_embeddings", inner)
    if rope_type == "llama3":
        return RopeConfig(
            rope_type=rope_type,
            theta=theta,
            factor=config_fields.number(parameters, "factor"),
            original_max_positions=original,
            low_freq_factor=config_fields.number(parameters, "low_freq_factor"),
            high_freq_factor=config_fields.number(parameters, "high_freq_factor"),
        )
    parse = _parse_yarn if rope_type == "yarn" else _parse_longrope
    return parse(parameters, theta, original, max_positions)


def _parse_yarn(parameters: Mapping[str, Any], theta: float, original: int, max_positions: int) -> RopeConfig:
    factor = config_fields.number(parameters, "factor", max_positions / max(original, 1))
    default = yarn_attention_factor(
        factor, config_fields.number(parameters, "mscale", 0.0), config_fields.number(parameters, "mscale_all_dim", 0.0)
    )
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_positions=original,
        beta_fast=config_fields.number(parameters, "beta_fast", 32.0),
        beta_slow=config_fields.number(parameters, "beta_slow", 1.0),
        attention_factor=config_fields.number(parameters, "attention_factor", default),
        truncate=config_fields.flag(parameters, "truncate", True),
    )


def _parse_longrope(parameters: Mapping[str, Any], theta: float, original: int, max_positions: int) -> RopeConfig:
    factor = config_fields.number(parameters, "factor", max_positions / max(original, 1))
    return LongRopeConfig(
        theta=theta,
        factor=factor,
        original_max_positions=original,
        attention_factor=config_fields.number(
            parameters, "attention_factor", longrope_attention_factor(factor, original)
        ),
        short_factor=config_fields.numbers(parameters, "short_factor"),
        long_factor=config_fields.numbers(parameters, "long_factor"),
    )


def rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """Returns the rope_scaling of a config.json, which has no rope_theta; None for the default type."""
    if rope.rope_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    named = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
        "longrope": ("attention_factor",),
    }
    scaling |= {name: getattr(rope, name) for name in named.get(rope.rope_type, ())}
    if isinstance(rope, LongRopeConfig):
        scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    return scaling


def rope_of_layers(rope: RopeConfig) -> dict[str, Any]:
    """Returns the entry of one kind of layer in rope_parameters, as transformers 5 nests them."""
    return {"rope_type": rope.rope_type, "rope_theta": rope.theta, **(rope_scaling(rope) or {})}
