"""The whole parameter layout of a config, and random parameters in it. Knows no checkpoint."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.llama.config import LlamaConfig
from cluscomp_jax.models.llama.model import LlamaModel
from cluscomp_jax.models.model import parameter_shapes


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of all dense parameters, blocks in order."""
    return parameter_shapes(LlamaModel(config))


def initial_value(name: str, shape: tuple[int, ...], key: jax.Array, deviation: float) -> jax.Array:
    """Returns a float32 array for the leaf `name`: norms ("weight") 1, "bias" 0, matrices normal with `deviation`."""
    if name == "weight":
        return jnp.ones(shape, jnp.float32)
    if name == "bias":
        return jnp.zeros(shape, jnp.float32)
    drawn: jax.Array = _normal(key, shape)
    return deviation * drawn


@partial(jax.jit, static_argnames="shape")
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Returns float32 parameters: matrices normal with deviation `initializer_range`, norms 1, biases 0.

    Args:
      config: of the model.
      key: a JAX random key; the same key gives the same parameters.
    """
    return initial_params(param_shapes(config), config.initializer_range, key)


def initial_params(shapes: Mapping[str, tuple[int, ...]], deviation: float, key: jax.Array) -> Params:
    """Returns the tree float32 of `initial_value` at every path of {path: shape}."""
    return trees.unflatten(
        {
            path: initial_value(path.rpartition("/")[2], shape, jax.random.fold_in(key, number), deviation)
            for number, (path, shape) in enumerate(sorted(shapes.items()))
        }
    )
