"""Configs of other libraries -> LlamaConfig: Hugging Face dicts and objects, tunix, bonsai, MaxText.

Imports none of those libraries: a config is recognised by the names of its attributes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layers import config_fields
from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.models.llama.config import LlamaConfig
from cluscomp_jax.models.llama.hf_config import parse_config

_TUNIX = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
}
_BONSAI = {**_TUNIX, "emb_dim": "hidden_size", "mlp_dim": "intermediate_size"}
del _BONSAI["embed_dim"], _BONSAI["hidden_dim"]
_MAXTEXT = {
    "vocab_size": "vocab_size",
    "emb_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_decoder_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "normalization_layer_epsilon": "rms_norm_eps",
}
_MAXTEXT_TYPES = {"llama2": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
_MAXTEXT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_experts": (None, 1),
    "final_logits_soft_cap": (None, 0, 0.0),
    "attn_logits_soft_cap": (None, 0, 0.0),
    "sliding_window_size": (None, 0),
    "rope_min_timescale": (None, 1),
    "rope_linear_scaling_factor": (None, 1, 1.0),
    "partial_rotary_factor": (None, 1, 1.0),
}
"""Attributes of MaxText's config, and the values with which they leave the computation as it is."""
_MAXTEXT_LLAMA31 = RopeConfig(rope_type="llama3", factor=8.0, original_max_positions=8192)
"""What MaxText's rotary embedding of Llama 3.1 has written into its code, less the base."""


def read_config(config: Any) -> LlamaConfig:
    """Returns the LlamaConfig of a config of another library; see `LlamaConfig.of`."""
    if isinstance(config, LlamaConfig):
        return config
    if isinstance(config, Mapping):
        return parse_config(config)
    if _has(config, _MAXTEXT):
        return _read_maxtext(config)
    if _has(config, _TUNIX):
        return _read_tunix(config, _TUNIX)
    if _has(config, _BONSAI):
        return _read_tunix(config, _BONSAI)
    if callable(getattr(config, "to_dict", None)):
        return parse_config(config.to_dict())
    raise InputError(
        f"LlamaConfig.of: a {type(config).__name__} is no config that is known; give a Hugging Face config dict, or a "
        "config of transformers, tunix, bonsai or MaxText"
    )


def _has(config: Any, names: Mapping[str, str]) -> bool:
    return all(hasattr(config, name) for name in names)


def _sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: getattr(config, theirs) for theirs, ours in names.items()}


def _read_tunix(config: Any, names: Mapping[str, str]) -> LlamaConfig:
    """Returns the config of a ModelConfig of tunix or bonsai, whose attributes differ by model."""
    if getattr(config, "num_experts", None):
        raise InputError(f"config: num_experts is {config.num_experts}, which is not supported; leave it out")
    if hasattr(config, "weight_tying"):
        model_type, tied = "llama", config.weight_tying
    elif hasattr(config, "tie_word_embeddings"):
        model_type, tied = "qwen3", config.tie_word_embeddings
    else:
        model_type = "qwen3" if hasattr(config, "num_experts") else "qwen2"
        tied = getattr(config, "use_tied_embedding", False)
    rope = RopeConfig(theta=float(config.rope_theta))
    return LlamaConfig(model_type=model_type, rope=rope, tie_word_embeddings=bool(tied), **_sizes(config, names))


def _read_maxtext(config: Any) -> LlamaConfig:
    name = _choice(config, "decoder_block", "")
    if name not in _MAXTEXT_TYPES:
        raise InputError(
            f"config: decoder_block is {name!r}, which is not supported; supported: {', '.join(_MAXTEXT_TYPES)}"
        )
    for field, neutral in _MAXTEXT_NEUTRAL.items():
        value = getattr(config, field, None)
        if value not in neutral:
            raise InputError(f"config: {field} is {config_fields.short(value)}, which is not supported")
    model_type = _MAXTEXT_TYPES[name]
    qk_norm, bias = bool(getattr(config, "use_qk_norm", False)), bool(getattr(config, "attention_bias", False))
    if qk_norm != (model_type == "qwen3"):
        raise InputError(f"config: use_qk_norm is {qk_norm} with decoder_block {name!r}, which is not supported")
    if bias != (model_type == "qwen2"):
        raise InputError(f"config: attention_bias is {bias} with decoder_block {name!r}, which is not supported")
    tied = bool(getattr(config, "logits_via_embedding", False))
    if tied and getattr(config, "normalize_embedding_logits", False):
        raise InputError(
            "config: normalize_embedding_logits is true with logits_via_embedding, which is not supported; "
            "logits are not divided by sqrt(emb_dim) here"
        )
    activations = tuple(getattr(config, "mlp_activations", ("silu", "linear")))
    if activations != ("silu", "linear"):
        raise InputError(f"config: mlp_activations is {activations}, which is not supported; only silu, linear is")
    return LlamaConfig(
        model_type=model_type,
        rope=_maxtext_rope(config),
        tie_word_embeddings=tied,
        **_sizes(config, _MAXTEXT),
    )


def _choice(config: Any, name: str, default: str) -> str:
    """Returns a text attribute, which newer releases have as a member of an enum."""
    value = getattr(config, name, default)
    return str(getattr(value, "value", value))


def _maxtext_rope(config: Any) -> RopeConfig:
    theta = float(getattr(config, "rope_max_timescale", 10_000))
    rope_type = _choice(config, "rope_type", "default").lower()
    llama31 = rope_type.startswith("llama3.1") or _choice(config, "model_name", "").startswith("llama3.1")
    if not llama31 and rope_type != "default":
        raise InputError(f"config: rope_type is {rope_type!r}, which is not supported; supported: default, llama3.1")
    if not llama31:
        return RopeConfig(theta=theta)
    if not getattr(config, "rope_use_scale", True):
        raise InputError(
            "config: rope_use_scale is false with the rope of Llama 3.1, which is not supported; cluster the blocks by "
            "compress_blocks or cluster_tree"
        )
    return dataclasses.replace(_MAXTEXT_LLAMA31, theta=theta)
