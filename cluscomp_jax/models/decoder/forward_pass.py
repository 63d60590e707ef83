"""The whole forward pass of any Model, one compiled program for each kind of block. Knows no family."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core import trees
from cluscomp_jax.core.caller_mesh import partitioned, spec_of
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.model import Model, build_model, run_block, run_embed


@partial(jax.jit, static_argnums=0)
def _head(model: Model, outer: Params, x: jax.Array) -> jax.Array:
    return model.head(outer, x)


def forward(params: Mapping[Any, Any], tokens: Any, config: Any, *, dtype: Any = jnp.float32) -> jax.Array:
    """Returns logits float32 [b, t, v]; compiles one block per layer type and shape, not one per layer.

    Args:
      params: the whole tree in FlaxLlama layout, string or integer layer keys, dense or compressed kernels.
      tokens: int [b, t], every one in [0, vocab_size).
      config: a family's config, or a Model.
      dtype: compute dtype: float32, bfloat16 or float16; changes the result within rounding.

    Raises:
      InputError: a part of the tree is missing.
    """
    model, tokens = build_model(config), jnp.asarray(tokens)
    run = partial(_forward, model=model, dtype=jnp.dtype(dtype))
    return partitioned(run, (trees.unflatten(trees.flatten(params)), tokens), (spec_of(tokens, 0), None, None))


def _forward(params: Mapping[Any, Any], tokens: jax.Array, *, model: Model, dtype: Any) -> jax.Array:
    outer = trees.without(params, model.blocks_path)
    x = run_embed(outer, tokens, model=model, dtype=dtype)
    for i in range(model.num_blocks):
        block = trees.subtree(params, f"{model.blocks_path}/{i}")
        x = run_block(block, x, model=model, layer_type=model.layer_type(i))
    logits: jax.Array = _head(model, outer, x)
    return logits
