"""The shapes of SmolLM2-135M and random codes of any shape, for the scripts that compare a step with PyTorch."""

import numpy as np

from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import index_dtype, index_shape

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def random_codes(rng: np.random.Generator, shape: tuple[int, int], *, g: int, num_codes: int) -> CodebookArray:
    """Returns a kernel [d_in, d_out] of random codes of variance 1 / d_in, on the host."""
    index = rng.integers(0, num_codes, index_shape(shape, g, "out")).astype(index_dtype(num_codes))
    codebook = (rng.standard_normal((num_codes, g)) / np.sqrt(shape[0])).astype(np.float32)
    return CodebookArray(codebook, index, shape, "out")
