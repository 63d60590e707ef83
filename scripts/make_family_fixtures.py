"""Writes tests/fixtures/family_logits: a tiny random model of each family of models/decoder with PyTorch's own logits.

Run once with the parity extra installed; the default tests then need no PyTorch:

    python scripts/make_family_fixtures.py

One safetensors file per family: the weights as transformers names and fuses them, float16, `tokens` int32 [b, t] and
the `logits` float32 [b, t, v] of these weights in float32; its metadata holds the config.json of transformers.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "family_logits"
LENGTH = 24
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
CASES: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
    },
    "granitemoehybrid": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "layer_types": ["full_attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 20,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_head": 4,
    },
    "olmo2": {},
    "olmo3": WINDOWS,
    "gemma2": WINDOWS | {"head_dim": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 4.0},
    "gemma3_text": WINDOWS | {"head_dim": 6, "query_pre_attn_scalar": 10},
    "phi3": {
        "hidden_size": 32,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.2, 1.5],
            "long_factor": [1.0, 3.0, 9.0],
        },
    },
    "ministral3": {
        "head_dim": 6,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "seed_oss": {"head_dim": 6, "attention_out_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12},
    "qwen3_moe": {"head_dim": 6, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8},
    "opt": {"ffn_dim": 24, "do_layer_norm_before": False, "word_embed_proj_dim": 12},
}


def torch_model(fields: dict[str, Any], seed: int) -> Any:
    """Returns the PyTorch model of config fields, every parameter random and a float16 number, computed in float32."""
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            drawn = parameter + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5
            parameter.copy_(drawn.half())
    return model


def main() -> None:
    """Writes every case, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[*CASES, []], help="model types to write; all by default")
    chosen = parser.parse_args().families
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for seed, (model_type, fields) in enumerate(CASES.items()):
        if chosen and model_type not in chosen:
            continue
        model = torch_model(TINY | fields | {"model_type": model_type}, seed)
        tokens = np.random.default_rng(seed).integers(0, TINY["vocab_size"], (1, LENGTH))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            stored = load_file(Path(folder) / "model.safetensors")
        tensors = {name: tensor.astype(np.float16) for name, tensor in stored.items()}
        path = FIXTURES / f"{model_type}.safetensors"
        extra = {"tokens": tokens.astype(np.int32), "logits": logits}
        save_file(tensors | extra, path, metadata={"config": json.dumps(config)})
        print(f"{path.name}: {path.stat().st_size} bytes, largest logit {np.abs(logits).max():.3f}")


if __name__ == "__main__":
    main()
