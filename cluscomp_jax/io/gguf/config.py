"""A GGUF header as a Hugging Face config mapping. Knows metadata keys, not tensors' values or files."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cluscomp_jax.errors import InputError

_REQUIRED = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32.

    GGUF stores metadata in float32, so 1e-05 reads back as 9.999999747378752e-06; this gives 1e-05 again.

    >>> shortest_decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))


def config_fields(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """Returns the fields of a config.json that say what a GGUF header says.

    Args:
      metadata: {key: value} of the header.
      shapes: {tensor name: row-major shape}; presence of biases and of an output head is read from it.
      rope_factors: float32 [head_dim/2], the tensor rope_freqs.weight where the file has one.

    Raises:
      InputError: a key is missing, or has a value that no llama family has; the line names it.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise InputError("the GGUF header has no general.architecture")
    if "token_embd.weight" not in shapes:
        raise InputError("the GGUF file has no tensor token_embd.weight; is it a language model?")
    fields: dict[str, Any] = {name: _scalar(metadata, f"{arch}.{key}") for name, key in _REQUIRED.items()}
    heads = fields["num_attention_heads"]
    fields |= {
        "model_type": arch,
        "rms_norm_eps": shortest_decimal(fields["rms_norm_eps"]),
        "num_key_value_heads": _scalar(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, arch, fields["hidden_size"], heads),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        "attention_bias": arch != "qwen2" and "blk.0.attn_q.bias" in shapes,  # Qwen2 has q, k, v biases unsaid
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "rope_theta": shortest_decimal(_scalar(metadata, f"{arch}.rope.freq_base", 10000.0)),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(metadata),
    }
    scaling = _rope_scaling(metadata, arch, fields["max_position_embeddings"])
    if rope_factors is not None:
        if scaling is not None:
            raise InputError(f"the GGUF file has both rope_freqs.weight and {arch}.rope.scaling.type; one is expected")
        scaling = _llama3_scaling(rope_factors, fields["head_dim"], fields["rope_theta"])
    if scaling is not None:
        fields["rope_scaling"] = scaling
    window = _scalar(metadata, f"{arch}.attention.sliding_window", 0)
    if window:
        if arch != "llama":
            raise InputError(f"{arch}.attention.sliding_window {window} is not supported; use the Hugging Face folder")
        fields |= {"model_type": "mistral", "sliding_window": window}
    return fields


def _scalar(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if value is None:
        raise InputError(f"the GGUF header has no {key}")
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key} in the GGUF header is {str(value)[:60]}; one number for all blocks is expected")
    return value


def _ends(metadata: Mapping[str, Any]) -> list[int] | None:
    """Returns the tokens that end a text, a turn and a message; None: the header names none."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(number for number in named if isinstance(number, int))) or None


def _head_dim(metadata: Mapping[str, Any], arch: str, hidden_size: int, heads: int) -> int:
    rotary = metadata.get(f"{arch}.rope.dimension_count")
    if heads < 1:
        raise InputError(f"{arch}.attention.head_count in the GGUF header is {heads}; at least 1 is expected")
    head_dim = int(_scalar(metadata, f"{arch}.attention.key_length", rotary or hidden_size // heads))
    for key, value in (
        ("rope.dimension_count", rotary or head_dim),
        ("attention.value_length", metadata.get(f"{arch}.attention.value_length", head_dim)),
    ):
        if value != head_dim:
            raise InputError(f"{arch}.{key} is {value}, the head dimension {head_dim}; they must be equal")
    return head_dim


def _rope_scaling(metadata: Mapping[str, Any], arch: str, context: int) -> dict[str, Any] | None:
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    read = {f"{arch}.rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned")}
    for key in metadata:
        if key.startswith((f"{arch}.rope.scaling.", f"{arch}.rope.scale_linear")) and key not in read:
            raise InputError(f"{key} in the GGUF header is not supported; use the Hugging Face folder")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"{arch}.rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": shortest_decimal(_scalar(metadata, f"{arch}.rope.scaling.factor")),
    }
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = int(
            _scalar(metadata, f"{arch}.rope.scaling.original_context_length", context)
        )
    return scaling


def _llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """Recovers the Llama 3 rope scaling from the divisors of the frequencies that converters write.

    The published models all use low 1, high 4 and an original context of 8192; only the factor differs
    (8 in 3.1, 32 in 3.2). The divisors under that reading are computed again and must agree.
    """
    factor = shortest_decimal(float(np.max(factors)))
    low, high, context = 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    divisors = 1.0 / ((1.0 - smooth) / factor + smooth)
    if factors.shape != divisors.shape or not np.allclose(factors, divisors, rtol=1e-4):
        raise InputError("rope_freqs.weight is not the rope scaling of Llama 3.1-3.3; use the Hugging Face folder")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
