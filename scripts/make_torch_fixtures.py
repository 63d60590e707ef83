"""Writes tests/fixtures/torch_logits: tiny random decoders of every family and rope type with PyTorch's own logits.

Run once with the parity extra installed; the default tests then need no PyTorch:

    python scripts/make_torch_fixtures.py

One safetensors file per case: the weights in FlaxLlama layout by path, `tokens` int32 [b, t] and `logits`
float32 [b, t, v]; its metadata holds the config.json that transformers writes for the model.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "torch_logits"
LENGTH = 40
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama_one_kv_head": {"model_type": "llama", "num_key_value_heads": 1, "rope_theta": 500000.0},
    "llama_tied_biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
    },
    "llama_gelu": {"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama_dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama_llama3": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama_yarn": {"model_type": "llama", "rope_scaling": YARN | {"beta_fast": 4.0, "beta_slow": 0.5}},
    "llama_yarn_mscale": {
        "model_type": "llama",
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False, "beta_fast": 3.0},
    },
    "mistral_window": {"model_type": "mistral", "sliding_window": 7},
    "mistral_full": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1000000.0},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_scaling": YARN,
    },
    "qwen3": {"model_type": "qwen3", "rope_theta": 1000000.0},
    "qwen3_window_biased": {
        "model_type": "qwen3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def torch_model(fields: dict[str, Any], seed: int) -> Any:
    """Returns the float32 PyTorch model of config fields, every parameter drawn at random so that none is idle."""
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def our_layout(model: Any) -> dict[str, np.ndarray]:
    """Returns {FlaxLlama path: array} of a PyTorch model; kernels become [d_in, d_out]."""
    tied = model.config.tie_word_embeddings
    flat = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = tensor.numpy()
        *parents, leaf = name.split(".")
        if parents[-1] == "embed_tokens":
            leaf = "embedding"
        elif leaf == "weight" and array.ndim == 2:
            leaf, array = "kernel", array.T
        flat["/".join([*parents, leaf])] = np.ascontiguousarray(array)
    return flat


def config_json(model: Any) -> dict[str, Any]:
    """Returns the config.json that transformers writes for the model."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        fields: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return fields


def main() -> None:
    """Writes every case."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for seed, (name, fields) in enumerate(CASES.items()):
        model = torch_model(TINY | fields, seed)
        tokens = np.random.default_rng(seed).integers(0, TINY["vocab_size"], (1, LENGTH))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        tensors = our_layout(model) | {"tokens": tokens.astype(np.int32), "logits": logits}
        path = FIXTURES / f"{name}.safetensors"
        save_file(tensors, path, metadata={"config": json.dumps(config_json(model))})
        print(f"{path.name}: {path.stat().st_size} bytes, largest logit {np.abs(logits).max():.3f}")


if __name__ == "__main__":
    main()
