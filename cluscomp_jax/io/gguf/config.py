"""A GGUF header as a Hugging Face config mapping. Knows metadata keys, not tensors' values or files."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.gguf_header import GgufHeader, number_of, shortest_decimal
from cluscomp_jax.models.model import family_of, model_type_of

_REQUIRED = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_PARTIAL = ("phi3",)
"""Architectures in which a part of the head may rotate."""
_READ_BY_FAMILIES = {
    "mistral3": ("yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier"),
    "phi3": ("attn_factor",),
}
"""{architecture: keys of rope.scaling that its family reads}."""


def config_fields(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    """Returns the fields of a config.json that say what a GGUF header says.

    Args:
      metadata: {key: value} of the header.
      shapes: {tensor name: row-major shape}; presence of biases and of an output head is read from it.
      read: read(tensor name) -> float32 array; of rope_freqs.weight, and of what the family has of such tensors.

    Raises:
      InputError: the architecture is not served, a key is missing, or has a value that the family has not; the line
        names it.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise InputError("the GGUF header has no general.architecture")
    if "token_embd.weight" not in shapes:
        raise InputError("the GGUF file has no tensor token_embd.weight; is it a language model?")
    experts = number_of(metadata, f"{arch}.expert_count", 0)
    model_type = "mixtral" if arch == "llama" and experts else model_type_of(arch)  # llama.cpp has one name for both
    family = family_of(model_type)
    if "gguf" not in getattr(family, "TENSOR_NAMES", {}):
        raise InputError(f"architecture {arch!r} is not read from GGUF files; use the Hugging Face folder")
    of_family = getattr(family, "gguf_fields", None)
    fields: dict[str, Any] = {name: number_of(metadata, f"{arch}.{key}") for name, key in _REQUIRED.items()}
    heads = fields["num_attention_heads"]
    fields |= {
        "model_type": model_type,
        "rms_norm_eps": shortest_decimal(fields["rms_norm_eps"]),
        "num_key_value_heads": number_of(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, arch, fields["hidden_size"], heads),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        "attention_bias": arch != "qwen2" and "blk.0.attn_q.bias" in shapes,  # Qwen2 has q, k, v biases unsaid
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "rope_theta": shortest_decimal(number_of(metadata, f"{arch}.rope.freq_base", 10000.0)),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(metadata),
    }
    scaling = _rope_scaling(metadata, arch, fields["max_position_embeddings"])
    if "rope_freqs.weight" in shapes:
        if scaling is not None:
            raise InputError(f"the GGUF file has both rope_freqs.weight and {arch}.rope.scaling.type; one is expected")
        scaling = _llama3_scaling(read("rope_freqs.weight"), fields["head_dim"], fields["rope_theta"])
    if scaling is not None:
        fields["rope_scaling"] = scaling
    if of_family is not None:
        fields |= of_family(GgufHeader(arch, metadata, shapes, read, fields))
    window = number_of(metadata, f"{arch}.attention.sliding_window", 0)
    if window and "sliding_window" not in fields:
        if arch != "llama":
            raise InputError(f"{arch}.attention.sliding_window {window} is not supported; use the Hugging Face folder")
        fields |= {"model_type": "mistral", "sliding_window": window}
    return fields


def _ends(metadata: Mapping[str, Any]) -> list[int] | None:
    """Returns the tokens that end a text, a turn and a message; None: the header names none."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(number for number in named if isinstance(number, int))) or None


def _head_dim(metadata: Mapping[str, Any], arch: str, hidden_size: int, heads: int) -> int:
    rotary = metadata.get(f"{arch}.rope.dimension_count")
    if heads < 1:
        raise InputError(f"{arch}.attention.head_count in the GGUF header is {heads}; at least 1 is expected")
    plain = hidden_size // heads
    head_dim = int(number_of(metadata, f"{arch}.attention.key_length", plain if arch in _PARTIAL else rotary or plain))
    for key, value in (
        ("rope.dimension_count", head_dim if arch in _PARTIAL else rotary or head_dim),
        ("attention.value_length", metadata.get(f"{arch}.attention.value_length", head_dim)),
    ):
        if value != head_dim:
            raise InputError(f"{arch}.{key} is {value}, the head dimension {head_dim}; they must be equal")
    return head_dim


def _rope_scaling(metadata: Mapping[str, Any], arch: str, context: int) -> dict[str, Any] | None:
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    names = ("type", "factor", "original_context_length", "finetuned", *_READ_BY_FAMILIES.get(arch, ()))
    read = {f"{arch}.rope.scaling.{key}" for key in names}
    for key in metadata:
        if key.startswith((f"{arch}.rope.scaling.", f"{arch}.rope.scale_linear")) and key not in read:
            raise InputError(f"{key} in the GGUF header is not supported; use the Hugging Face folder")
    if kind == "none" or (kind == "longrope" and arch == "phi3"):  # its factors are tensors
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"{arch}.rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": shortest_decimal(number_of(metadata, f"{arch}.rope.scaling.factor")),
    }
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = int(
            number_of(metadata, f"{arch}.rope.scaling.original_context_length", context)
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
