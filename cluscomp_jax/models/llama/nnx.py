"""Flax nnx adapter: the decoder as an nnx module over given parameters, dense or compressed.

Thin: the computation is `llama.forward`. Knows no training loop.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.llama.config import LlamaConfig
from cluscomp_jax.models.llama.init import param_shapes
from cluscomp_jax.models.llama.model import forward


class NnxLlama(nnx.Module):  # type: ignore[misc]
    """The decoder as an nnx module: `NnxLlama(config, params)(tokens)` gives logits float32 [b, t, v].

    Attributes follow the FlaxLlama layout (`module.model.layers[0].self_attn.q_proj.kernel`), every leaf an
    nnx.Param; `nnx.to_pure_dict(nnx.state(module))` is the params tree with integer layer keys, which every
    function of this package takes.
    """

    def __init__(self, config: LlamaConfig, params: Mapping[Any, Any], *, dtype: Any = jnp.float32):
        """Builds the module around the arrays of `params`; nothing is copied.

        Args:
          config: of the model.
          params: FlaxLlama layout, string or integer layer keys, dense or compressed kernels.
          dtype: compute dtype.

        Raises:
          InputError: a path of the config's layout is missing, or one too many is there.
        """
        flat = trees.flatten(params)
        for path in sorted(param_shapes(config).keys() ^ flat.keys()):
            state = "not part of this model" if path in flat else "missing"
            raise InputError(f"parameters: {path} is {state}; params and config must be of one model")
        self.config = config
        self.dtype = dtype
        for name, inner in trees.unflatten(flat).items():
            setattr(self, name, _Branch(inner))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits float32 [b, t, v] of int tokens [b, t]."""
        return forward(nnx.to_pure_dict(nnx.state(self, nnx.Param)), tokens, self.config, dtype=self.dtype)


class _Branch(nnx.Module):  # type: ignore[misc]
    """Holds a tree as attributes; keys "0", "1", … become a list."""

    def __init__(self, tree: Mapping[str, Any]):
        for name, inner in tree.items():
            setattr(self, name, _node(inner))


def _node(inner: Any) -> Any:
    if not isinstance(inner, Mapping):
        return nnx.Param(inner)
    if "0" in inner:
        return nnx.List([_node(inner[str(i)]) for i in range(len(inner))])
    return _Branch(inner)
