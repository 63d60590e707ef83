"""The types of the GGUF keys that are read here, checked once when a file is opened."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError

_TEXT, _WHOLE, _NUMBER, _TRUTH = "a text", "an integer from 0 to 2**31-1", "a finite number", "true or false"
_TEXTS, _WHOLES, _NUMBERS = "a list of texts", "a list of integers", "a list of numbers"

_KEYS = {
    "general.architecture": _TEXT,
    "split.count": _WHOLE,
    "split.no": _WHOLE,
    "tokenizer.chat_template": _TEXT,
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.tokens": _TEXTS,
    "tokenizer.ggml.merges": _TEXTS,
    "tokenizer.ggml.scores": _NUMBERS,
    "tokenizer.ggml.token_type": _WHOLES,
    **{f"tokenizer.ggml.{name}_token_id": _WHOLE for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
    **{f"tokenizer.ggml.add_{name}": _TRUTH for name in ("bos_token", "eos_token", "space_prefix")},
}
_OF_ARCHITECTURE = {
    "block_count": _WHOLE,
    "context_length": _WHOLE,
    "embedding_length": _WHOLE,
    "attention.key_length": _WHOLE,
    "attention.value_length": _WHOLE,
    "attention.layer_norm_rms_epsilon": _NUMBER,
    "attention.sliding_window": _WHOLE,
    "rope.dimension_count": _WHOLE,
    "rope.freq_base": _NUMBER,
    "rope.scaling.type": _TEXT,
    "rope.scaling.factor": _NUMBER,
    "rope.scaling.original_context_length": _WHOLE,
    "rope.scaling.attn_factor": _NUMBER,
    "rope.scaling.yarn_beta_fast": _NUMBER,
    "rope.scaling.yarn_beta_slow": _NUMBER,
    "rope.scaling.yarn_log_multiplier": _NUMBER,
    "rope.freq_base_swa": _NUMBER,
    "attention.scale": _NUMBER,
    "attention.temperature_scale": _NUMBER,
    "attn_logit_softcapping": _NUMBER,
    "final_logit_softcapping": _NUMBER,
    "embedding_scale": _NUMBER,
    "residual_scale": _NUMBER,
    "logit_scale": _NUMBER,
}
"""Others may list one number per block: attention.head_count, attention.head_count_kv, feed_forward_length."""


def check_keys(metadata: Mapping[str, Any]) -> None:
    """Raises InputError where a key that is read has a value of another type than it is defined with."""
    architecture = metadata.get("general.architecture")
    expected = _KEYS | {f"{architecture}.{key}": kind for key, kind in _OF_ARCHITECTURE.items()}
    for key, kind in expected.items():
        if key in metadata and not _is(metadata[key], kind):
            raise InputError(f"{key} in the GGUF header is {str(metadata[key])[:60]!r}; {kind} is expected")


def _is(value: Any, kind: str) -> bool:
    items = {_TEXTS: _TEXT, _WHOLES: _WHOLE, _NUMBERS: _NUMBER}
    if kind in items:
        return isinstance(value, list) and all(_is(item, items[kind]) for item in value)
    if kind == _TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or kind == _TRUTH:
        return isinstance(value, bool) and kind == _TRUTH
    if kind == _WHOLE:
        return isinstance(value, int) and 0 <= value < 2**31
    return isinstance(value, int | float) and abs(value) < float("inf")
