"""Small Llamas with windows and without, and random parameters and tokens of them."""

import numpy as np

from cluscomp_jax.core import trees
from cluscomp_jax.models.llama import LlamaConfig
from cluscomp_jax.models.llama.init import param_shapes

SMALL = {
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.3,
}
WINDOWED = LlamaConfig(model_type="mistral", sliding_window=3, **SMALL)
MIXED = LlamaConfig(model_type="qwen3", sliding_window=4, layer_types=("full_attention", "sliding_attention"), **SMALL)


def random_params(config, seed=0):
    """Every leaf random, norms and biases too, so that none is idle."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = rng.normal(0, 0.3, shape).astype(np.float32)
        return 1 + noise if path.endswith("weight") else noise

    return trees.unflatten({path: draw(path, shape) for path, shape in param_shapes(config).items()})


def random_tokens(config, shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)
