"""The published shapes of some models, so that a run can be planned before anything is downloaded."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import parse_model_config


def _fields(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> Mapping[str, Any]:
    """Returns the config.json of a Llama, with `more` in place of its values."""
    return MappingProxyType(
        {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            **more,
        }
    )


_LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-2-7b": _fields(32, 4096, 11008, 32, 32, 32000, 4096),
        "llama-2-13b": _fields(40, 5120, 13824, 40, 40, 32000, 4096),
        "llama-2-70b": _fields(80, 8192, 28672, 64, 8, 32000, 4096),
        "llama-3-8b": _fields(32, 4096, 14336, 32, 8, 128256, 8192, rope_theta=500000.0),
        "llama-3-70b": _fields(80, 8192, 28672, 64, 8, 128256, 8192, rope_theta=500000.0),
        "llama-3.1-405b": _fields(
            126, 16384, 53248, 128, 8, 128256, 131072, rope_theta=500000.0, rope_scaling=_LLAMA_3_1_ROPE
        ),
        "mistral-7b": _fields(32, 4096, 14336, 32, 8, 32768, 32768, model_type="mistral", rope_theta=1e6),
        "qwen2.5-72b": _fields(80, 8192, 29568, 64, 8, 152064, 131072, model_type="qwen2", rope_theta=1e6),
    }
)
"""{name: the fields of its config.json that decide shapes and programs}. mistral-7b is version 0.3."""


def preset_config(name: str) -> Any:
    """Returns the family's config of a preset.

    Raises:
      InputError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return parse_model_config(PRESETS[name])
