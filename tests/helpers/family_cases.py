"""Small configs of every family of `models/decoder`, in the styles of published config.json files, and parameters.

Sizes are small; names, and which fields there are, are those of the published models.
"""

from typing import Any

import numpy as np

from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.model import build_model, parameter_shapes, parse_model_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHORT = [1.0, 1.1, 1.3]
LONG = [1.0, 2.5, 6.0]
MINISTRAL_ROPE = {
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CASES: dict[str, dict[str, Any]] = {
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 1, 1, 0],
        "no_rope_layer_interval": 4,
        "rope_theta": 5000000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "smollm3_window": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3_yarn": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 0, 1],
        "rope_theta": 5000000.0,
        "rope_scaling": YARN,
        "head_dim": 12,
    },
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    },
    "granite_biased": {
        "model_type": "granite",
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3,
        "logits_scaling": 1.5,
        "residual_multiplier": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "granite_plain": {"model_type": "granite", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "granite4": {
        "model_type": "granitemoehybrid",
        "attention_multiplier": 0.0625,
        "embedding_multiplier": 12,
        "logits_scaling": 4,
        "residual_multiplier": 0.263,
        "layer_types": ["attention"] * 4,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 40,
        "position_embedding_type": "rope",
        "rope_theta": 10000000,
        "tie_word_embeddings": True,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "granite4_nope": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 4,
        "num_local_experts": 0,
        "shared_intermediate_size": 56,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.5,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "granite4_biased": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 4,
        "num_local_experts": 0,
        "attention_bias": True,
        "position_embedding_type": "rope",
        "mamba_n_heads": 16,
        "mamba_d_head": 4,
    },
    "olmo2": {
        "model_type": "olmo2",
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "rope_scaling": None,
    },
    "olmo2_groups": {"model_type": "olmo2", "tie_word_embeddings": True},
    "olmo2_biased": {"model_type": "olmo2", "attention_bias": True, "rope_scaling": YARN},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 6,
        "rope_theta": 500000,
        "rope_scaling": YARN | {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1},
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "olmo3_nested": {
        "model_type": "olmo3",
        "sliding_window": 4,
        "rope_parameters": {
            "full_attention": {"rope_theta": 500000.0, **YARN},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "olmo3_full": {"model_type": "olmo3", "layer_types": ["full_attention"] * 4, "attention_bias": True},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 5,
        "rope_theta": 10000.0,
    },
    "gemma2_uncapped": {
        "model_type": "gemma2",
        "head_dim": 12,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 8,
        "sliding_window": 3,
        "attention_bias": True,
    },
    "gemma2_full": {"model_type": "gemma2", "head_dim": 8, "layer_types": ["full_attention"] * 4},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_hidden_layers": 7,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": 6,
        "sliding_window_pattern": 6,
    },
    "gemma3_nested": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "final_logit_softcapping": 2.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gemma3_scaled": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "num_hidden_layers": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 8,
        "attention_bias": True,
    },
    "phi3": {
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": 9,
    },
    "phi4": {"model_type": "phi3", "rope_theta": 250000, "sliding_window": None},
    "phi4_mini": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 20,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        "tie_word_embeddings": True,
    },
    "phi3_long": {
        "model_type": "phi3",
        "max_position_embeddings": 96,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [*SHORT, 1.7], "long_factor": [*LONG, 8.0]},
    },
    "ministral3": {"model_type": "ministral3", "head_dim": 12, "rope_parameters": MINISTRAL_ROPE},
    "ministral3_window": {
        "model_type": "ministral3",
        "head_dim": 8,
        "sliding_window": 6,
        "rope_parameters": MINISTRAL_ROPE | {"mscale": 0.7, "llama_4_scaling_beta": 0.4},
    },
    "ministral3_plain": {
        "model_type": "ministral3",
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.3,
        },
        "tie_word_embeddings": True,
    },
    "opt": {
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "ffn_dim": 48,
        "init_std": 0.02,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": 32,
        "_remove_final_layer_norm": False,
        "tie_word_embeddings": True,
    },
    "opt_post_norm": {  # opt-350m
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": False,
        "ffn_dim": 40,
        "word_embed_proj_dim": 20,
        "_remove_final_layer_norm": False,
    },
    "galactica": {
        "model_type": "opt",
        "activation_function": "gelu",
        "do_layer_norm_before": True,
        "enable_bias": False,
        "ffn_dim": 56,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
    },
    "opt_unnormed": {  # finetuned before transformers 4.20
        "model_type": "opt",
        "ffn_dim": 48,
        "num_attention_heads": 2,
        "_remove_final_layer_norm": True,
    },
    "seed_oss": {
        "model_type": "seed_oss",
        "head_dim": 16,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000000.0,
        "rope_scaling": {"rope_type": "default"},
    },
    "seed_oss_biased": {"model_type": "seed_oss", "head_dim": 8, "attention_out_bias": True, "mlp_bias": True},
    "seed_oss_plain": {
        "model_type": "seed_oss",
        "head_dim": 8,
        "attention_bias": False,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    },
    "mixtral_window": {
        "model_type": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "mixtral_single": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_window_layers": 4,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "qwen3_moe_shares": {
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe_window": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
}
"""{name: fields that differ from SIZES}; three or more a family."""


def fields_of(name: str) -> dict[str, Any]:
    """Returns the config.json fields of a case."""
    return SIZES | CASES[name]


def random_params(config: Any, seed: int = 0) -> Any:
    """Every leaf random, norms and biases too, so that none is idle; norms near what leaves numbers as they are."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(0, 0.3, shape).astype(np.float32)
        return noise + (path.endswith("weight") and config.norm_weight != "offset")

    return trees.unflatten({p: draw(p, shape) for p, shape in parameter_shapes(build_model(config)).items()})


def model_of_kinds(kinds):
    """Returns a small Gemma 3 with a windowed layer for every 0, and a full one for every 1."""
    types = ["full_attention" if kind else "sliding_attention" for kind in kinds]
    changes = {"num_hidden_layers": len(types), "layer_types": types, "sliding_window_pattern": None}
    return build_model(parse_model_config(fields_of("gemma3_nested") | changes))


def compressed(model):
    """Returns random parameters of a small model, its projections CodebookArrays of 12 codes of 4 weights."""
    rng = np.random.default_rng(0)

    def one(path, shape):
        if not path.endswith("_proj/kernel"):
            return (0.2 * rng.standard_normal(shape)).astype(np.float32)
        codebook = (0.3 * rng.standard_normal((12, 4))).astype(np.float16)
        index = rng.integers(0, 12, (shape[0], -(-shape[1] // 4))).astype(np.uint8)
        return CodebookArray(codebook, index, shape, "out")

    return trees.unflatten({path: one(path, shape) for path, shape in parameter_shapes(model).items()})
