"""What the config.json of most families has in common, read and written. Knows no family.

A field that would change the computation is read by the family or refused by name here; fields without bearing on it
(dropout, cache switches, versions) are not read.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder.config import FULL, MAX_LAYERS, SLIDING, DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields
from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.models.layers.rope_fields import parse_rope, rope_of_layers, rope_parameters, rope_scaling

# Each of these changes the computation unless absent, null, false or the value given here.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "decoder_sparse_step": 1,
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "compression_config": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "is_encoder_decoder": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "mlp_only_layers": [],
    "no_rope_layers": None,
    "num_experts": None,
    "num_local_experts": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_parallel_residual": False,
    "use_qk_norm": False,
}
# What Llama's reader has its own word for, or does not read.
_MORE_NEUTRAL: dict[str, Any] = NEUTRAL | {
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "rope_local_base_freq": None,
    "sliding_window": None,
    "sliding_window_pattern": None,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
}


def refuse_unserved(fields: Mapping[str, Any], neutral: Mapping[str, Any] = NEUTRAL) -> None:
    """Raises InputError where a field asks for a computation that the family does not do.

    Args:
      fields: of the config.
      neutral: {name: the value, next to null and false, with which a field leaves the computation as it is}.
    """
    for name, value_that_is in neutral.items():
        value = fields.get(name)
        if value is not None and value is not False and value != value_that_is:
            served = "leave it out" if value_that_is is None else f"only {value_that_is!r} is"
            raise InputError(f"config: {name} is {config_fields.short(value)}, which is not supported; {served}")


def refuse_all_but(fields: Mapping[str, Any], served: Collection[str]) -> None:
    """Raises InputError where a field that some family reads, other than those `served`, changes the computation."""
    refuse_unserved(fields, {name: value for name, value in _MORE_NEUTRAL.items() if name not in served})


def read_sizes(
    fields: Mapping[str, Any],
    *,
    max_positions: int = 2048,
    eps: float = 1e-6,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    tied: bool = False,
    activation: str = "hidden_act",
    activation_default: str = "silu",
) -> dict[str, Any]:
    """Returns the arguments of DecoderConfig that every family has in its config.json; token numbers default to none.

    Args:
      fields: of the config.
      max_positions: default of max_position_embeddings, as the others: of rms_norm_eps; of head_dim, None being
        hidden_size / num_attention_heads; of num_key_value_heads, None being num_attention_heads; and of
        tie_word_embeddings.
      eps, head_dim, kv_heads, tied: see above.
      activation: the name of the field of the activation.
      activation_default: its default.

    Raises:
      InputError: a size is missing, or a value has another type.
    """
    heads, hidden = config_fields.integer(fields, "num_attention_heads"), config_fields.integer(fields, "hidden_size")
    if head_dim is None:
        if fields.get("head_dim") is None and hidden % heads:
            raise InputError(
                f"config: hidden_size {hidden} is no multiple of num_attention_heads {heads}; give head_dim"
            )
        head_dim = hidden // heads
    return {
        "model_type": fields.get("model_type"),
        "vocab_size": config_fields.integer(fields, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config_fields.integer(fields, "intermediate_size"),
        "num_hidden_layers": layer_count(fields),
        "num_attention_heads": heads,
        "num_key_value_heads": config_fields.integer(fields, "num_key_value_heads", kv_heads or heads),
        "head_dim": config_fields.integer(fields, "head_dim", head_dim),
        "max_position_embeddings": config_fields.integer(fields, "max_position_embeddings", max_positions),
        "rms_norm_eps": config_fields.number(fields, "rms_norm_eps", eps),
        "hidden_act": config_fields.text(fields, activation, activation_default),
        "tie_word_embeddings": config_fields.flag(fields, "tie_word_embeddings", tied),
        "initializer_range": config_fields.number(fields, "initializer_range", 0.02),
        "bos_token_id": config_fields.token(fields, "bos_token_id"),
        "eos_token_id": config_fields.tokens(fields, "eos_token_id"),
        "pad_token_id": config_fields.token(fields, "pad_token_id"),
    }


def layer_count(fields: Mapping[str, Any]) -> int:
    """Returns num_hidden_layers.

    Raises:
      InputError: it is missing, or beyond 4,096, so that no list of a damaged config fills the memory.
    """
    layers = config_fields.integer(fields, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise InputError(f"config: num_hidden_layers is {layers}; it must be an integer from 1 to {MAX_LAYERS}")
    return layers


def read_layers(
    fields: Mapping[str, Any], default: Iterable[str], window: Any, ropes: Mapping[str, RopeConfig | None]
) -> tuple[LayerKind, ...]:
    """Returns the kinds of the layers.

    Args:
      fields: of the config; its layer_types, where given, say which layers slide.
      default: the type of each layer where the config gives none.
      window: of the sliding layers.
      ropes: {"full_attention" or "sliding_attention": the rotary embedding of such layers}.

    Raises:
      InputError: layer_types have other names or another number, or a layer slides without a window.
    """
    layers = layer_count(fields)
    types = config_fields.texts(fields, "layer_types") or tuple(default)
    if len(types) != layers:
        raise InputError(f"config: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    for layer_type in types:
        if layer_type not in (FULL, SLIDING):
            raise InputError(f"config: layer type {layer_type!r} is not supported; supported: {FULL}, {SLIDING}")
    if SLIDING in types and window is None:
        raise InputError(f"config: layer_types names {SLIDING!r} but sliding_window is not set")
    return tuple(LayerKind(window if kind == SLIDING else None, ropes[kind]) for kind in types)


def write_sizes(config: DecoderConfig, architecture: str, *, activation: str = "hidden_act") -> dict[str, Any]:
    """Returns the fields of config.json that `read_sizes` reads, JSON-ready."""
    ends = list(config.eos_token_id)
    fields: dict[str, Any] = {"architectures": [architecture]}
    fields |= {name: getattr(config, name) for name in _COPIED}
    fields[activation] = config.hidden_act
    fields["eos_token_id"] = None if not ends else ends[0] if len(ends) == 1 else ends
    return fields


_COPIED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "initializer_range", "bos_token_id", "pad_token_id",
)  # fmt: skip


def layer_types(config: DecoderConfig) -> list[str]:
    """Returns the layer_types of config.json."""
    return [FULL if kind.window is None else SLIDING for kind in config.layers]


def window_of(config: DecoderConfig) -> int | None:
    """Returns the window of the sliding layers, None if no layer slides."""
    return next((kind.window for kind in config.layers if kind.window is not None), None)


def some_window(config: DecoderConfig) -> int:
    """Returns `window_of`, or 4096: for families whose code in transformers makes the mask of sliding layers always."""
    return window_of(config) or 4096


def one_rope(config: DecoderConfig) -> RopeConfig:
    """Returns the rotary embedding of the layers that have one; the default one where none has."""
    return next((kind.rope for kind in config.layers if kind.rope is not None), RopeConfig())


def read_rope(fields: Mapping[str, Any], sizes: Mapping[str, Any], *, theta: float = 10000.0) -> RopeConfig:
    """Returns the one rotary embedding of a config.

    Args:
      fields: of the config.
      sizes: of `read_sizes`.
      theta: the base where the config gives none.

    Raises:
      InputError: what `parse_rope` refuses.
    """
    return parse_rope(fields, rope_parameters(fields), sizes["max_position_embeddings"], theta=theta)


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of config.json that `read_rope` reads, in the style of transformers 4, JSON-ready."""
    rope = one_rope(config)
    return {"rope_theta": rope.theta, "rope_scaling": rope_scaling(rope)}


def ropes_by_type(config: DecoderConfig, types: Sequence[str] = (FULL, SLIDING)) -> dict[str, dict[str, Any]]:
    """Returns rope_parameters with an entry for each layer type that the config has."""
    found = dict(zip(layer_types(config), (kind.rope for kind in config.layers), strict=True))
    ropes = {kind: found.get(kind) for kind in types}
    return {kind: rope_of_layers(rope) for kind, rope in ropes.items() if rope is not None}


def read_ropes(
    fields: Mapping[str, Any], max_positions: int, *, theta: Mapping[str, float], local_theta: str = "rope_theta"
) -> dict[str, RopeConfig]:
    """Returns the rotary embedding of each layer type: of rope_parameters by layer type, or, in the style of
    transformers 4, of rope_theta and rope_scaling, which only full layers read.

    Args:
      fields: of the config.
      max_positions: max_position_embeddings.
      theta: {layer type: base where the config gives none}.
      local_theta: the field of the sliding layers' base in the style of transformers 4.

    Raises:
      InputError: both styles, an unknown layer type, or what `parse_rope` refuses.
    """
    given = rope_parameters(fields)
    nested = {kind: given[kind] for kind in (FULL, SLIDING) if kind in given}
    if nested and len(nested) < len(given):
        other = next(name for name in given if name not in nested)
        raise InputError(
            f"config: rope_parameters has {other!r} next to {next(iter(nested))!r}; only layer types may be"
        )
    parts = nested or {FULL: given}
    bases = {FULL: fields.get("rope_theta"), SLIDING: fields.get(local_theta)}
    found = {}
    for kind in (FULL, SLIDING):
        part = parts.get(kind) or {}
        if not isinstance(part, Mapping):
            raise InputError(f"config: rope_parameters of {kind} is {config_fields.short(part)}; it must be a mapping")
        own = {"rope_theta": theta[kind] if bases[kind] is None else bases[kind]}
        own |= {name: value for name, value in part.items() if value is not None}
        found[kind] = parse_rope({}, own, max_positions)
    return found
