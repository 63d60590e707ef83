"""Flax linen adapter: the decoder as a linen module. Other linen modules have `cluscomp_jax.integrations.linen`.

Thin: the computation is `llama.forward`. Knows no training loop.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cluscomp_jax.core import trees
from cluscomp_jax.models.llama.config import LlamaConfig
from cluscomp_jax.models.llama.init import initial_value, param_shapes
from cluscomp_jax.models.llama.model import forward


class FlaxLlama(nn.Module):  # type: ignore[misc]
    """The decoder as a linen module; `init` and `apply` speak the FlaxLlama layout exactly.

    `apply({"params": params}, tokens)` takes dense or compressed kernels and returns logits float32 [b, t, v].

    Attributes:
      config: of the model.
      dtype: compute dtype.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits float32 [b, t, v] of int tokens [b, t]."""
        shapes = trees.unflatten(param_shapes(self.config))
        deviation = self.config.initializer_range
        params = {name: _Branch(inner, deviation, name=name)() for name, inner in shapes.items()}
        return forward(params, tokens, self.config, dtype=self.dtype)


class _Branch(nn.Module):  # type: ignore[misc]
    """Declares the parameters of a tree of shapes under the same names, and returns them."""

    shapes: Mapping[str, Any]
    deviation: float

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self) -> dict[str, Any]:
        return {
            name: _Branch(inner, self.deviation, name=name)() if isinstance(inner, Mapping) else self._leaf(name, inner)
            for name, inner in self.shapes.items()
        }

    def _leaf(self, name: str, shape: tuple[int, ...]) -> Any:
        # self.param compares a CodebookArray's own arrays with the dense shape and refuses it.
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, lambda key: initial_value(name, shape, key, self.deviation))
