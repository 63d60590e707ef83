"""Hugging Face config.json <-> LlamaConfig, transformers 4 style (rope_theta, rope_scaling) and 5 (rope_parameters).

A field that would change the computation and is not served is refused by name; fields without bearing on it
(dropout, cache switches, versions) are not read. Knows no files.
"""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layers import config_fields
from cluscomp_jax.models.layers.rope import ROPE_TYPES, RopeConfig, yarn_attention_factor
from cluscomp_jax.models.llama.config import FULL, MODEL_TYPES, SLIDING, LlamaConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_WINDOWED = ("qwen2", "qwen3")

# Each of these changes the computation unless absent, null, false or the value given here.
_NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
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

_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
# Read elsewhere, or written by converters and read by no implementation.
_ROPE_KEYS_OF_ALL = ("type", "rope_type", "rope_theta", "original_max_position_embeddings", "finetuned")


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
        rope=_parse_rope(fields, max_positions),
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
    fields |= {"rope_theta": config.rope.theta, "rope_scaling": _rope_scaling(config.rope)}
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
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and value is not False and value != neutral:
            served = "leave it out" if neutral is None else f"only {neutral!r} is"
            raise InputError(f"config: {name} is {config_fields.short(value)}, which is not supported; {served}")
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


def _parse_rope(fields: Mapping[str, Any], max_positions: int) -> RopeConfig:
    parameters = _rope_mapping(fields)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise InputError(
            f"config: rope type {config_fields.short(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    unknown = sorted(set(parameters) - {*_ROPE_KEYS_OF_ALL, *_ROPE_KEYS[rope_type]})
    if unknown:
        raise InputError(
            f"config: rope type {rope_type!r} does not read {unknown[0]!r}; remove it if it has no meaning"
        )
    theta = config_fields.number(parameters, "rope_theta", config_fields.number(fields, "rope_theta", 10000.0))
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
    return _parse_yarn(parameters, theta, original, max_positions)


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


def _rope_mapping(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rope_scaling or rope_parameters, whichever is there, without its null entries."""
    found = {name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name)}
    for name, value in found.items():
        if not isinstance(value, Mapping):
            raise InputError(f"config: {name} is {config_fields.short(value)}; it must be a mapping or null")
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise InputError("config: rope_scaling and rope_parameters are both given and differ; keep one of them")
    parameters = {name: value for name, value in next(iter(found.values()), {}).items() if value is not None}
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config: partial_rotary_factor is not 1.0, which is not supported; only 1.0 is")
    return parameters


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.rope_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    named = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    return scaling | {name: getattr(rope, name) for name in named.get(rope.rope_type, ())}
