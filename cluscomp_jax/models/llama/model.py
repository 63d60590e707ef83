"""LlamaModel: the shared decoder by the switches of a LlamaConfig. Knows nothing of files, sampling or training.

Letters: b batch, t time, d hidden_size, v vocab_size.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder import forward_pass
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.decoder.model import DecoderModel
from cluscomp_jax.models.llama.config import LlamaConfig

_SAME = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "tie_word_embeddings", "mlp_bias", "qkv_bias",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlamaModel(DecoderModel):
    """The `cluscomp_jax.models.model.Model` of one LlamaConfig.

    Attributes:
      config: of the model.
      scaled_queries: whether the kernel of q already contains the factor 1/sqrt(head_dim), as in MaxText's Llama.
      neighbours: whether the outputs of q and k have the channels that rotate together next to each other
        (`cluscomp_jax.models.layers.rope.rotate`).
    """

    config: LlamaConfig
    scaled_queries: bool = False
    neighbours: bool = False

    @cached_property
    def switches(self) -> DecoderConfig:
        """The record that the computation reads."""
        c = self.config
        return DecoderConfig(
            **{name: getattr(c, name) for name in _SAME},
            layers=tuple(LayerKind(c.window(i), c.rope) for i in range(c.num_hidden_layers)),
            qk_norm="head" if c.qk_norm else "none",
            o_bias=c.attention_bias,
        )

    def layer_type(self, i: int) -> Hashable:
        """Returns the attention window of block i, None for all positions."""
        return self.config.window(i)

    def kind_of(self, layer_type: Hashable) -> LayerKind:
        """Returns the LayerKind of an attention window.

        Raises:
          InputError: it is no window.
        """
        if layer_type is not None and not isinstance(layer_type, int):
            raise InputError(f"layer type {layer_type!r} is not one of this family; take it from layer_type(i)")
        return LayerKind(layer_type, self.config.rope)


def build(config: LlamaConfig) -> LlamaModel:
    """Returns the Model of a config.

    Raises:
      InputError: a config of another library, such as transformers.
    """
    if not isinstance(config, LlamaConfig):
        found = f"{type(config).__module__}.{type(config).__qualname__}"
        raise InputError(f"the model config is a {found}; give cluscomp_jax.llama.LlamaConfig.of(it)")
    return LlamaModel(config)


def forward(params: Mapping[Any, Any], tokens: Any, config: LlamaConfig, *, dtype: Any = jnp.float32) -> jax.Array:
    """Returns logits float32 [b, t, v]; compiles one block per layer type and shape, not one per layer.

    Args:
      params: the whole tree in FlaxLlama layout, string or integer layer keys, dense or compressed kernels.
      tokens: int [b, t], every one in [0, vocab_size).
      config: of the model.
      dtype: compute dtype: float32, bfloat16 or float16; changes the result within rounding.

    Raises:
      InputError: a part of the tree is missing.
    """
    return forward_pass.forward(params, tokens, build(config), dtype=dtype)
