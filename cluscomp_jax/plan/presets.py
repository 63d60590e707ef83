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


def _opt(layers: int, hidden: int, heads: int, **more: Any) -> Mapping[str, Any]:
    """Returns the config.json of an OPT, with `more` in place of its values."""
    return MappingProxyType(
        {
            "model_type": "opt",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "ffn_dim": 4 * hidden,
            "num_attention_heads": heads,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
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

_GRANITE_8B: dict[str, Any] = {
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "logits_scaling": 16.0,
    "residual_multiplier": 0.22,
    "rope_theta": 1e7,
    "tie_word_embeddings": True,
}
_GEMMA_2_27B: dict[str, Any] = {
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_3: dict[str, Any] = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "tie_word_embeddings": True,
}
_GEMMA_3_27B = _GEMMA_3 | {
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
_QWEN3_30B_A3B: dict[str, Any] = {
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
_MINISTRAL_8B: dict[str, Any] = {
    "head_dim": 128,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
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
        "mixtral-8x7b": _fields(32, 4096, 14336, 32, 8, 32000, 32768, model_type="mixtral", rope_theta=1e6),
        "qwen3-30b-a3b": _fields(48, 2048, 6144, 32, 4, 151936, 40960, model_type="qwen3_moe", **_QWEN3_30B_A3B),
        "qwen2.5-72b": _fields(80, 8192, 29568, 64, 8, 152064, 131072, model_type="qwen2", rope_theta=1e6),
        "smollm3-3b": _fields(
            36, 2048, 11008, 16, 4, 128256, 65536, model_type="smollm3", rope_theta=5e6, tie_word_embeddings=True
        ),
        "granite-3.3-8b": _fields(40, 4096, 12800, 32, 8, 49159, 131072, model_type="granite", **_GRANITE_8B),
        "olmo-2-7b": _fields(32, 4096, 11008, 32, 32, 100352, 4096, model_type="olmo2", rope_theta=5e5),
        "olmo-3-32b": _fields(
            64, 5120, 27648, 40, 8, 100278, 65536, model_type="olmo3", rope_theta=5e5, sliding_window=4096
        ),
        "gemma-2-27b": _fields(46, 4608, 36864, 32, 16, 256000, 8192, model_type="gemma2", **_GEMMA_2_27B),
        "gemma-3-1b": _fields(26, 1152, 6912, 4, 1, 262144, 32768, model_type="gemma3_text", **_GEMMA_3),
        "gemma-3-27b": _fields(62, 5376, 21504, 32, 16, 262208, 131072, model_type="gemma3_text", **_GEMMA_3_27B),
        "phi-3-mini": _fields(32, 3072, 8192, 32, 32, 32064, 4096, model_type="phi3", sliding_window=2047),
        "phi-4": _fields(40, 5120, 17920, 40, 10, 100352, 16384, model_type="phi3", rope_theta=250000.0),
        "ministral-3-8b": _fields(34, 4096, 14336, 32, 8, 131072, 262144, model_type="ministral3", **_MINISTRAL_8B),
        "seed-oss-36b": _fields(
            64, 5120, 27648, 80, 8, 155136, 524288, model_type="seed_oss", head_dim=128, rope_theta=1e7
        ),
        "opt-125m": _opt(12, 768, 12),
        "opt-350m": _opt(24, 1024, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
        "opt-1.3b": _opt(24, 2048, 32),
        "opt-2.7b": _opt(32, 2560, 32),
        "opt-6.7b": _opt(32, 4096, 32),
        "opt-13b": _opt(40, 5120, 40),
        "opt-30b": _opt(48, 7168, 56),
        "opt-66b": _opt(64, 9216, 72),
    }
)
"""{name: the fields of its config.json that decide shapes and programs}.

mistral-7b is version 0.3; gemma-3-27b and ministral-3-8b are the text models; phi-3-mini has a context of 4,096.
"""


def preset_config(name: str) -> Any:
    """Returns the family's config of a preset.

    Raises:
      InputError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return parse_model_config(PRESETS[name])
