"""The decoder as pure functions of (params, x): embedding, block, head, cached block, and the whole forward pass.

Dense and compressed kernels run through the same `linear`. Knows nothing of files, sampling or training.
Letters: b batch, t time, d hidden_size, v vocab_size, h head_dim, q query heads, k key-value heads.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core import trees
from cluscomp_jax.core.caller_mesh import partitioned, spec_of
from cluscomp_jax.core.linear import linear
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layers import kv_cache
from cluscomp_jax.models.layers.attention import attention, causal_attention, causal_mask
from cluscomp_jax.models.layers.rope import rotary_tables, rotate
from cluscomp_jax.models.llama.config import LlamaConfig
from cluscomp_jax.models.model import Cache, Observer, run_block, run_embed

BLOCKS_PATH = "model/layers"
INPUT_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "self_attn/input": tuple(f"self_attn/{name}_proj/kernel" for name in "qkv"),
        "self_attn/output": ("self_attn/o_proj/kernel",),
        "mlp/input": ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"),
        "mlp/hidden": ("mlp/down_proj/kernel",),
    }
)
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""attend(queries [b, t, q, h], keys [b, k, t, h], values [b, k, t, h]) -> [b, t, q, h]; keys already rotated."""


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + eps) * weight in the dtype of x; the division is float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scaled.astype(x.dtype) * jnp.asarray(weight).astype(x.dtype)


def _project(params: Params, x: jax.Array) -> jax.Array:
    return linear(x, params["kernel"], params.get("bias"))


@dataclasses.dataclass(frozen=True)
class LlamaModel:
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

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.config.num_hidden_layers

    @property
    def blocks_path(self) -> str:
        """The path of the blocks in the parameters."""
        return BLOCKS_PATH

    @property
    def input_groups(self) -> Mapping[str, tuple[str, ...]]:
        """{input group: block-relative paths of the kernels that read one input}, in order of computation."""
        return INPUT_GROUPS

    @property
    def row_parallel(self) -> frozenset[str]:
        """The kernels whose inputs come in parts out of column-parallel ones: those that end attention and MLP."""
        return frozenset({"self_attn/o_proj/kernel", "mlp/down_proj/kernel"})

    def layer_type(self, i: int) -> Hashable:
        """Returns the attention window of block i, None for all positions."""
        return self.config.window(i)

    def block_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Returns {block-relative path: shape} of the dense parameters of block i."""
        c = self.config
        d, inner = c.hidden_size, c.intermediate_size
        queries, pairs = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        attention_sides = {"q": (d, queries), "k": (d, pairs), "v": (d, pairs), "o": (queries, d)}
        mlp_sides = {"gate": (d, inner), "up": (d, inner), "down": (inner, d)}
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm/weight": (d,)}
        for name, sides in attention_sides.items():
            shapes[f"self_attn/{name}_proj/kernel"] = sides
            if c.attention_bias if name == "o" else c.qkv_bias:
                shapes[f"self_attn/{name}_proj/bias"] = sides[1:]
        if c.qk_norm:
            shapes |= {f"self_attn/{name}_norm/weight": (c.head_dim,) for name in "qk"}
        shapes["post_attention_layernorm/weight"] = (d,)
        for name, sides in mlp_sides.items():
            shapes[f"mlp/{name}_proj/kernel"] = sides
            if c.mlp_bias:
                shapes[f"mlp/{name}_proj/bias"] = sides[1:]
        return shapes

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns {path: shape} of the parameters outside the blocks."""
        c = self.config
        shapes: dict[str, tuple[int, ...]] = {
            "model/embed_tokens/embedding": (c.vocab_size, c.hidden_size),
            "model/norm/weight": (c.hidden_size,),
        }
        if not c.tie_word_embeddings:
            shapes["lm_head/kernel"] = (c.hidden_size, c.vocab_size)
        return shapes

    def embed(self, outer: Params, tokens: jax.Array, *, dtype: Any) -> jax.Array:
        """Returns x [b, t, d] of `dtype` for int tokens [b, t]; NaN where a token is past the vocabulary."""
        table = jnp.asarray(outer["model"]["embed_tokens"]["embedding"])
        return jnp.take(table, tokens, axis=0, mode="fill").astype(dtype)

    def head(self, outer: Params, x: jax.Array) -> jax.Array:
        """Returns logits float32 [b, t, v] of x [b, t, d]; products are of x's dtype, sums float32."""
        normed = rms_norm(x, outer["model"]["norm"]["weight"], self.config.rms_norm_eps)
        if self.config.tie_word_embeddings:
            table = jnp.asarray(outer["model"]["embed_tokens"]["embedding"]).astype(x.dtype)
            return jnp.einsum("btd,vd->btv", normed, table, preferred_element_type=jnp.float32)
        return linear(normed, outer["lm_head"]["kernel"], out_dtype=jnp.float32)

    def block(self, params: Params, x: jax.Array, *, layer_type: Hashable, observer: Observer | None = None) -> Any:
        """Returns y [b, t, d] of x [b, t, d]; with an observer, (y, {input group: what the observer returns}).

        Args:
          params: the block's tree, block-relative paths, dense or compressed kernels.
          x: positions 0 … t-1; its dtype is the compute dtype.
          layer_type: of the block.
          observer: see `cluscomp_jax.models.model.Observer`.
        """

        def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            return causal_attention(queries, keys, values, _window(layer_type))

        observed: dict[str, Any] = {}

        def observe(group: str, value: jax.Array, residual: jax.Array | None = None) -> None:
            if observer is not None:
                observed[group] = observer(group, value, residual)

        y = self._residual_block(params, x, jnp.arange(x.shape[1]), x.shape[1], attend, observe)
        return y if observer is None else (y, observed)

    def init_cache(self, i: int, batch: int, length: int, dtype: Any) -> Cache:
        """Returns the empty cache of block i: keys and values [batch, k, length, h] of `dtype`, floating or int8."""
        return kv_cache.empty((batch, self.config.num_key_value_heads, length, self.config.head_dim), dtype)

    def cached_block(
        self,
        params: Params,
        x: jax.Array,
        cache: Cache,
        position: jax.Array | int,
        *,
        layer_type: Hashable,
        length: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Returns (y [b, t, d], new cache) of x [b, t, d] at positions `position` … position+t-1.

        A `position` that is the number 0, not traced, spares what only later positions need.
        Earlier positions are read from the cache; position + t must not exceed its size (not checked: traced).
        `length` is the number of positions of the sequence after this call, less than position + t where x is padded
        at its end; None: position + t. The dynamic rope reads it; columns of y at and past it have no meaning.
        Keys are kept as they were rotated when written, as transformers does; so with the dynamic rope beyond
        the original context, cached decoding and a fresh forward pass differ there as here.
        """
        t, size = x.shape[1], cache["keys"].shape[2]
        length = position + t if length is None else length
        positions = position + jnp.arange(t)
        mask = causal_mask(positions, jnp.arange(size), _window(layer_type))
        begins = isinstance(position, int) and position == 0 and t > 1  # then nothing in the cache is older than x
        written: Cache = {}

        def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            written.update(kv_cache.write(cache, keys, values, position))
            stored_keys, stored_values = kv_cache.read(written, x.dtype)
            if begins:
                return causal_attention(queries, stored_keys[:, :, :t], stored_values[:, :, :t], _window(layer_type))
            return attention(queries, stored_keys, stored_values, mask)

        y = self._residual_block(params, x, positions, length, attend, lambda *_: None)
        return y, written

    def _residual_block(
        self,
        params: Params,
        x: jax.Array,
        positions: jax.Array,
        length: Any,
        attend: Attend,
        observe: Callable[..., None],
    ) -> jax.Array:
        eps = self.config.rms_norm_eps
        normed = rms_norm(x, params["input_layernorm"]["weight"], eps)
        observe("self_attn/input", normed)
        mixed = self._attention_mix(params["self_attn"], normed, positions, length, attend)
        observe("self_attn/output", mixed, x)
        x = x + _project(params["self_attn"]["o_proj"], mixed)
        normed = rms_norm(x, params["post_attention_layernorm"]["weight"], eps)
        observe("mlp/input", normed)
        mlp = params["mlp"]
        gate = _ACTIVATIONS[self.config.hidden_act](_project(mlp["gate_proj"], normed))
        hidden = gate * _project(mlp["up_proj"], normed)
        observe("mlp/hidden", hidden, x)
        return x + _project(mlp["down_proj"], hidden)

    def _attention_mix(
        self, params: Params, x: jax.Array, positions: jax.Array, length: Any, attend: Attend
    ) -> jax.Array:
        """Returns the input [b, t, q*h] of o_proj."""
        c = self.config
        b, t, _ = x.shape
        queries, keys, values = (_project(params[f"{n}_proj"], x).reshape(b, t, -1, c.head_dim) for n in "qkv")
        if c.qk_norm:
            queries = rms_norm(queries, params["q_norm"]["weight"], c.rms_norm_eps)
            keys = rms_norm(keys, params["k_norm"]["weight"], c.rms_norm_eps)
        tables = rotary_tables(c.rope, c.head_dim, positions, length, x.dtype)
        queries, keys = (rotate(x, tables, neighbours=self.neighbours) for x in (queries, keys))
        if self.scaled_queries:
            queries = queries * jnp.asarray(c.head_dim**0.5, queries.dtype)
        return attend(queries, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)).reshape(b, t, -1)


def _window(layer_type: Hashable) -> int | None:
    if layer_type is not None and not isinstance(layer_type, int):
        raise InputError(f"layer type {layer_type!r} is not one of this family; take it from layer_type(i)")
    return layer_type


def build(config: LlamaConfig) -> LlamaModel:
    """Returns the Model of a config.

    Raises:
      InputError: a config of another library, such as transformers.
    """
    if not isinstance(config, LlamaConfig):
        found = f"{type(config).__module__}.{type(config).__qualname__}"
        raise InputError(f"the model config is a {found}; give cluscomp_jax.llama.LlamaConfig.of(it)")
    return LlamaModel(config)


@partial(jax.jit, static_argnums=0)
def _head(model: LlamaModel, outer: Params, x: jax.Array) -> jax.Array:
    return model.head(outer, x)


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
    model, tokens = build(config), jnp.asarray(tokens)
    run = partial(_forward, model=model, dtype=jnp.dtype(dtype))
    return partitioned(run, (trees.unflatten(trees.flatten(params)), tokens), (spec_of(tokens, 0), None, None))


def _forward(params: Mapping[Any, Any], tokens: jax.Array, *, model: LlamaModel, dtype: Any) -> jax.Array:
    outer = trees.without(params, BLOCKS_PATH)
    x = run_embed(outer, tokens, model=model, dtype=dtype)
    for i in range(model.num_blocks):
        block = trees.subtree(params, f"{BLOCKS_PATH}/{i}")
        x = run_block(block, x, model=model, layer_type=model.layer_type(i))
    logits: jax.Array = _head(model, outer, x)
    return logits
