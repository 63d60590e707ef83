"""A random compressed Llama of three blocks, for the tests of training."""

import jax
import ml_dtypes
import numpy as np

from cluscomp_jax import llama
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import index_dtype, index_shape

CONFIG = llama.LlamaConfig(
    vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3,
)  # fmt: skip
MODEL = llama.build(CONFIG)
KERNELS = tuple(path for paths in MODEL.input_groups.values() for path in paths)


def compressed_params(*, odd_block=None, dtype=np.float16, config=CONFIG, n=12, scale=0.3):
    """The whole tree; block `odd_block`, if there is one, is cut along the other axis than the rest."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        _, _, relative = path.removeprefix("model/layers/").partition("/")
        if relative not in KERNELS:
            return np.asarray(leaf)
        axis = "in" if path.startswith(f"model/layers/{odd_block}/") else "out"
        index = rng.integers(0, n, index_shape(leaf.shape, 4, axis)).astype(index_dtype(n))
        return CodebookArray((scale * rng.standard_normal((n, 4))).astype(dtype), index, tuple(leaf.shape), axis)

    return trees.map_by_path(one, llama.init_params(config, jax.random.key(0)))


def batch(seed=0, *, rows=4, length=9, vocab=CONFIG.vocab_size):
    """(tokens [rows, length], scored) with about a third of the tokens not scored."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, (rows, length)).astype(np.int32), rng.random((rows, length)) < 0.7


BF16 = ml_dtypes.bfloat16
