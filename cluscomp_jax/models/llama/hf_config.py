"""Hugging Face config.json <-> LlamaConfig, transformers 4 style (rope_theta, rope_scaling) and 5 (rope_parameters).

A field that would change the computation and is not served is refused by name; fields without bearing on it
(dropout, cache switches, versions) are not read. Knows no files.
"""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder.config import FULL, SLIDING
from cluscomp_jax.models.decoder.hf_fields import refuse_unserved
from cluscomp_jax.models.layers import config_fields, rope_fields
from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.models.llama.config import MODEL_TYPES, LlamaConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_WINDOWED = ("qwen2", "qwen3")


def parse_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """Returns the LlamaConfig of a config.json mapping.

    Absent fields take the defaults of transformers, token numbers none.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"config: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    _refuse_unserved(fields, model_type)
    heads, hidden = config_fields.integer(fields, "num_attention_heads"), config_fields.integer(fields, "hidden_size")
    if model_type != "qwen3" and fields.get("head_dim") is None and hidden % heads:
        raise InputError(f"config: hidden_size {hidden} is no multiple of num_attention_heads {heads}; give head_dim")
    head_dim = config_fields.integer(fields, "head_dim", 128 if model_type == "qwen3" else hidden // heads)
    max_positions = config_fields.integer(fields, "max_position_embeddings", _DEFAULT_POSITIONS[model_type])
    window, layer_types = _windows(fields, model_type)
    return LlamaConfig(
        model_type=model_type,
        vocab_size=config_fields.integer(fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=config_fields.integer(fields, "intermediate_size"),
        num_hidden_layers=config_fields.integer(fields, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=config_fields.integer(
            fields, "num_key_value_heads", 8 if model_type == "mistral" else heads
        ),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=config_fields.number(fields, "rms_norm_eps", 1e-6),
        hidden_act=config_fields.text(fields, "hidden_act", "silu"),
        tie_word_embeddings=config_fields.flag(fields, "tie_word_embeddings"),
        rope=_rope(fields, max_positions),
        sliding_window=window,
        layer_types=layer_types,
        attention_bias=model_type != "qwen2" and config_fields.flag(fields, "attention_bias"),
        mlp_bias=config_fields.flag(fields, "mlp_bias"),
        initializer_range=config_fields.number(fields, "initializer_range", 0.02),
        bos_token_id=config_fields.token(fields, "bos_token_id"),
        eos_token_id=config_fields.tokens(fields, "eos_token_id"),
        pad_token_id=config_fields.token(fields, "pad_token_id"),
    )


def to_hf_dict(config: LlamaConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping in transformers 4 style, which version 5 reads too.

    Invariant: parse_config(to_hf_dict(config)) == config.
    """
    fields: dict[str, Any] = {"architectures": [_ARCHITECTURES[config.model_type]]}
    for name in _COPIED:
        fields[name] = getattr(config, name)
    ends = list(config.eos_token_id)
    fields["eos_token_id"] = None if not ends else ends[0] if len(ends) == 1 else ends
    fields |= {"rope_theta": config.rope.theta, "rope_scaling": rope_fields.rope_scaling(config.rope)}
    if config.model_type in ("llama", "qwen3"):
        fields["attention_bias"] = config.attention_bias
    if config.model_type == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        fields["sliding_window"] = config.sliding_window
    if config.model_type in _WINDOWED:
        full = config.layer_types.index(SLIDING) if SLIDING in config.layer_types else config.num_hidden_layers
        fields |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": full,
            "layer_types": list(config.layer_types),
        }
    return fields


_COPIED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "tie_word_embeddings", "initializer_range", "bos_token_id", "pad_token_id",
)  # fmt: skip
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768, "qwen3": 32768}


def _refuse_unserved(fields: Mapping[str, Any], model_type: str) -> None:
    refuse_unserved(fields)
    for name, families in (("sliding_window", ("mistral", *_WINDOWED)), ("use_sliding_window", _WINDOWED)):
        if model_type not in families and fields.get(name):
            raise InputError(
                f"config: {name} is {config_fields.short(fields[name])}; "
                f"{model_type} attends without windows, leave it out"
            )


def _windows(fields: Mapping[str, Any], model_type: str) -> tuple[int | None, tuple[str, ...]]:
    """Returns (sliding_window, layer_types) as LlamaConfig takes them."""
    given = fields.get("layer_types")
    if given is not None and not (isinstance(given, list | tuple) and all(isinstance(kind, str) for kind in given)):
        raise InputError(f"config: layer_types is {config_fields.short(given)}; it must be a list of strings")
    layers = config_fields.integer(fields, "num_hidden_layers")
    if model_type not in _WINDOWED:
        default = 4096 if model_type == "mistral" else None
        window = fields.get("sliding_window", default)
        kind = FULL if window is None else SLIDING
        if given is not None and any(one != kind for one in given):
            raise InputError(
                f"config: layer_types is {config_fields.short(given)}; every layer of this {model_type} is {kind!r}"
            )
        return window, ()
    if not config_fields.flag(fields, "use_sliding_window"):
        return None, tuple(given or ())
    window = fields.get("sliding_window", 4096)
    if given is None:
        full = config_fields.integer(fields, "max_window_layers", 28, least=0)
        given = [FULL if window is None or i < full else SLIDING for i in range(min(layers, 4096))]
    return window, tuple(given)


def _rope(fields: Mapping[str, Any], max_positions: int) -> RopeConfig:
    parameters = rope_fields.rope_parameters(fields)
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config: partial_rotary_factor is not 1.0, which is not supported; only 1.0 is")
    return rope_fields.parse_rope(fields, parameters, max_positions)
