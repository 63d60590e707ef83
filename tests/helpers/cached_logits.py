"""A model computed piece by piece through its cache."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import trees


def cached_logits(model: Any, params: Any, tokens: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """Logits of tokens [b, t], given from each bound to the next; the cache has room for five more."""
    step = jax.jit(model.cached_block, static_argnames="layer_type")
    caches = [model.init_cache(i, len(tokens), bounds[-1] + 5, jnp.float32) for i in range(model.num_blocks)]
    pieces = []
    for start, end in itertools.pairwise(bounds):
        x = model.embed(params, tokens[:, start:end], dtype=jnp.float32, position=start)
        for i in range(model.num_blocks):
            block = trees.subtree(params, f"{model.blocks_path}/{i}")
            x, caches[i] = step(block, x, caches[i], jnp.int32(start), layer_type=model.layer_type(i))
        pieces.append(np.asarray(model.head(params, x)))
    return np.concatenate(pieces, axis=1)
