"""The decoder as pure functions of (params, x): embedding, block, head, cached block.

Dense and compressed kernels run through the same `linear`. What differs between families is in the switches of a
DecoderConfig. Knows nothing of files, sampling or training.
Letters: b batch, t time, d hidden_size, v vocab_size, h head_dim, q query heads, k key-value heads.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.core.linear import linear
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder import experts, parameters
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.layers import kv_cache
from cluscomp_jax.models.layers.attention import attention, causal_attention, causal_mask
from cluscomp_jax.models.layers.norms import layer_norm, rms_norm
from cluscomp_jax.models.layers.rope import rotary_tables, rotate
from cluscomp_jax.models.model import Cache, Observer, check_length


def _relu2(x: jax.Array) -> jax.Array:
    positive = jax.nn.relu(x)
    return positive * positive


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": _relu2,
}


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""attend(queries [b, t, q, h], keys [b, k, t, h], values [b, k, t, h]) -> [b, t, q, h]; keys already rotated."""


class _Place(NamedTuple):
    """Where the columns of a block's x are: int [t] positions, of sequences of `length` positions, in a layer."""

    positions: jax.Array
    length: Any
    kind: LayerKind


def _project(params: Params, x: jax.Array) -> jax.Array:
    return linear(x, params["kernel"], params.get("bias"))


def _capped(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def _unseen(*_: Any) -> None:
    """Is told of an input group where there is no observer."""


def _times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


@dataclasses.dataclass(frozen=True)
class DecoderModel:
    """The `cluscomp_jax.models.model.Model` of one DecoderConfig.

    Attributes:
      config: of the model.
    """

    config: Any

    scaled_queries = False
    """Whether the kernel of q already contains the factor 1/sqrt(head_dim)."""
    neighbours = False
    """Whether the channels of q and k that rotate together are next to each other (`layers.rope.rotate`)."""

    @property
    def switches(self) -> DecoderConfig:
        """The record that the computation reads: the config itself, unless the family has one of its own."""
        switches: DecoderConfig = self.config
        return switches

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.switches.num_hidden_layers

    @property
    def blocks_path(self) -> str:
        """The path of the blocks in the parameters."""
        return parameters.BLOCKS_PATH

    @property
    def input_groups(self) -> Mapping[str, tuple[str, ...]]:
        """{input group: block-relative paths of the kernels that read one input}, in order of computation."""
        if self.switches.experts is not None:
            return self._groups_with_experts
        return parameters.INPUT_GROUPS if self.switches.gated_mlp else parameters.UNGATED

    @cached_property
    def _groups_with_experts(self) -> Mapping[str, tuple[str, ...]]:
        return parameters.groups_with_experts(self._mlp_paths)

    @property
    def _mlp_paths(self) -> tuple[str, ...]:
        """The block-relative paths of the MLP, or of all experts."""
        mixture = self.switches.experts
        return ("mlp",) if mixture is None else tuple(f"mlp/experts/{i}" for i in range(mixture.count))

    @property
    def independent_groups(self) -> Sequence[tuple[str, ...]]:
        """The input groups in order of computation, those of one tuple independent of one another."""
        names, count = tuple(self.input_groups), len(self._mlp_paths)
        return names[:1], names[1:2], names[2 : 2 + count], names[2 + count :]

    @property
    def row_parallel(self) -> frozenset[str]:
        """The kernels whose inputs come in parts out of column-parallel ones: those that end attention and MLP."""
        return frozenset({"self_attn/o_proj/kernel", *(f"{path}/down_proj/kernel" for path in self._mlp_paths)})

    def arranged(self, params: Params) -> Params:
        """Returns a block's parameters with its experts stacked, which otherwise every call does."""
        if self.switches.experts is None:
            return params
        return {**params, "mlp": {**params["mlp"], "experts": experts.stacked(params["mlp"]["experts"])}}

    def layer_type(self, i: int) -> Hashable:
        """Returns the LayerKind of block i; blocks of one kind share compiled programs."""
        return self.switches.layers[i]

    def kind_of(self, layer_type: Hashable) -> LayerKind:
        """Returns the LayerKind that a layer type of this model means.

        Raises:
          InputError: it is the layer type of another family.
        """
        if not isinstance(layer_type, LayerKind):
            raise InputError(f"layer type {layer_type!r} is not one of this family; take it from layer_type(i)")
        return layer_type

    def block_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Returns {block-relative path: shape} of the dense parameters of block i."""
        return parameters.block_shapes(self.switches, self._mlp_paths)

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns {path: shape} of the parameters outside the blocks."""
        return parameters.outer_shapes(self.switches)

    def embed(self, outer: Params, tokens: jax.Array, *, dtype: Any, position: Any = None) -> jax.Array:
        """Returns x [b, t, d] of `dtype` for int tokens [b, t]; NaN where a token is past the vocabulary.

        `position` is that of the first column, a number or int [b]; None: 0. Only learned positions read it.

        Raises:
          InputError: `position` is None and there are more columns than learned positions.
        """
        table = jnp.asarray(outer["model"]["embed_tokens"]["embedding"])
        found = jnp.take(table, tokens, axis=0, mode="fill").astype(dtype)
        if self.switches.embedding_size is not None:
            found = _project(outer["model"]["project_in"], found)
        found = _times(found, self.switches.embedding_multiplier)
        return found if self.switches.position_offset is None else found + self._positions(outer, found, position)

    def _positions(self, outer: Params, x: jax.Array, position: Any) -> jax.Array:
        """Returns the learned positions [t, d], or [b, t, d] where rows differ, that are added to x [b, t, d].

        A column past the table takes its last row: as NaN, padding would come through attention's product with zero.
        """
        if position is None:
            check_length(x.shape[1], self, "a sequence")
        first = jnp.asarray(0 if position is None else position, jnp.int32) + jnp.int32(self.switches.position_offset)
        rows = first[..., None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        table = jnp.asarray(outer["model"]["embed_positions"]["embedding"])
        return jnp.take(table, rows, axis=0, mode="clip").astype(x.dtype)

    def head(self, outer: Params, x: jax.Array) -> jax.Array:
        """Returns logits float32 [b, t, v] of x [b, t, d]; products are of x's dtype, sums float32."""
        c = self.switches
        normed = self._norm(outer["model"], "norm" if c.final_norm else None, x)
        if c.embedding_size is not None:
            normed = _project(outer["model"]["project_out"], normed)
        if c.tie_word_embeddings:
            table = jnp.asarray(outer["model"]["embed_tokens"]["embedding"]).astype(x.dtype)
            logits = jnp.einsum("btd,vd->btv", normed, table, preferred_element_type=jnp.float32)
        else:
            logits = linear(normed, outer["lm_head"]["kernel"], out_dtype=jnp.float32)
        return _capped(logits if c.logits_divisor == 1 else logits / c.logits_divisor, c.logits_softcap)

    def block(self, params: Params, x: jax.Array, *, layer_type: Hashable, observer: Observer | None = None) -> Any:
        """Returns y [b, t, d] of x [b, t, d]; with an observer, (y, {input group: what the observer returns}).

        Args:
          params: the block's tree, block-relative paths, dense or compressed kernels.
          x: positions 0 … t-1; its dtype is the compute dtype.
          layer_type: of the block.
          observer: see `cluscomp_jax.models.model.Observer`.
        """
        kind, c = self.kind_of(layer_type), self.switches

        def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            return causal_attention(queries, keys, values, kind.window, c.attention_scale, c.attention_softcap)

        place = _Place(jnp.arange(x.shape[1]), x.shape[1], kind)
        if observer is None:
            return self._residual_block(params, x, place, attend, None)
        observed: dict[str, Any] = {}
        see = observer

        def observe(
            group: str, value: jax.Array, residual: jax.Array | None = None, weights: jax.Array | None = None
        ) -> None:
            observed[group] = see(group, value, residual, weights)

        return self._residual_block(params, x, place, attend, observe), observed

    def init_cache(self, i: int, batch: int, length: int, dtype: Any) -> Cache:
        """Returns the empty cache of block i: keys and values [batch, k, length, h] of `dtype`, floating or int8."""
        return kv_cache.empty((batch, self.switches.num_key_value_heads, length, self.switches.head_dim), dtype)

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
        at its end; None: position + t. The dynamic and longrope ropes read it; columns of y at and past it have no
        meaning. Keys are kept as they were rotated when written, as transformers does; so with these ropes beyond
        the original context, cached decoding and a fresh forward pass differ there as here.
        """
        kind, c = self.kind_of(layer_type), self.switches
        t, size = x.shape[1], cache["keys"].shape[2]
        length = position + t if length is None else length
        positions = position + jnp.arange(t)
        mask = causal_mask(positions, jnp.arange(size), kind.window)
        begins = isinstance(position, int) and position == 0 and t > 1  # then nothing in the cache is older than x
        written: Cache = {}

        def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            written.update(kv_cache.write(cache, keys, values, position))
            stored_keys, stored_values = kv_cache.read(written, x.dtype)
            how = {"scale": c.attention_scale, "softcap": c.attention_softcap}
            if begins:
                return causal_attention(queries, stored_keys[:, :, :t], stored_values[:, :, :t], kind.window, **how)
            return attention(queries, stored_keys, stored_values, mask, **how)

        y = self._residual_block(params, x, _Place(positions, length, kind), attend, None)
        return y, written

    def _norm(self, params: Params, name: str | None, x: jax.Array) -> jax.Array:
        c = self.switches
        if name is None:
            return x
        if c.norm == "rms":
            return rms_norm(x, params[name]["weight"], c.rms_norm_eps, c.norm_weight)
        leaves = params[name] if c.norm == "layer" else {}
        return layer_norm(x, leaves.get("weight"), leaves.get("bias"), c.rms_norm_eps)

    def _residual_block(
        self, params: Params, x: jax.Array, place: _Place, attend: Attend, observe: Callable[..., None] | None
    ) -> jax.Array:
        norms, saw = parameters.NORMS[self.switches.norms], observe or _unseen
        normed = self._norm(params, norms.before_attention, x)
        saw("self_attn/input", normed)
        mixed = self._attention_mix(params["self_attn"], normed, place, attend)
        saw("self_attn/output", mixed, self._observed_residual(x, norms.after_attention))
        x = x + self._branch(params, norms.after_attention, _project(params["self_attn"]["o_proj"], mixed))
        x = self._norm(params, norms.after_attention_sum, x)
        normed = self._norm(params, norms.before_mlp, x)
        if self.switches.experts is None:
            saw("mlp/input", normed)
            hidden = self._hidden(params["mlp"], normed)
            saw("mlp/hidden", hidden, self._observed_residual(x, norms.after_mlp))
            y = _project(params["mlp"]["down_proj"], hidden)
        else:
            y = self._expert_mix(params["mlp"], normed, observe)
        x = x + self._branch(params, norms.after_mlp, y)
        return self._norm(params, norms.after_mlp_sum, x)

    def _hidden(self, mlp: Params, x: jax.Array) -> jax.Array:
        """Returns the input [..., inner] of down_proj."""
        gated = self.switches.gated_mlp
        hidden = _ACTIVATIONS[self.switches.hidden_act](_project(mlp["gate_proj" if gated else "up_proj"], x))
        return hidden * _project(mlp["up_proj"], x) if gated else hidden

    def _expert_mix(self, mlp: Params, x: jax.Array, observe: Callable[..., None] | None) -> jax.Array:
        """Returns the output [b, t, d] of the mixture of experts; an observer sees all positions of every expert."""
        mixture = self.switches.experts
        assert mixture is not None
        rows = x.reshape(-1, x.shape[-1])
        routing = experts.route(_project(mlp["router"], rows), mixture)
        if observe is not None:
            for i, path in enumerate(self._mlp_paths):
                weights = routing.weights(i, mixture).reshape(x.shape[:-1])
                observe(f"{path}/input", x, None, weights)
                observe(f"{path}/hidden", self._hidden(mlp["experts"][str(i)], x), None, weights)
        stack = experts.stacked(mlp["experts"])

        def run(expert: jax.Array, rows: jax.Array) -> jax.Array:
            own = experts.expert_at(stack, expert)
            return _project(own["down_proj"], self._hidden(own, rows))

        return experts.mix(rows, routing, mixture.count, run).reshape(x.shape)

    def _branch(self, params: Params, norm: str | None, y: jax.Array) -> jax.Array:
        """Returns what is added to the residual, of the output y of attention or MLP."""
        return _times(self._norm(params, norm, y), self.switches.residual_multiplier)

    def _observed_residual(self, x: jax.Array, norm: str | None) -> jax.Array | None:
        """Returns the residual in the unit of a projection's output; None where a norm is between them."""
        return None if norm is not None else _times(x, 1 / self.switches.residual_multiplier)

    def _attention_mix(self, params: Params, x: jax.Array, place: _Place, attend: Attend) -> jax.Array:
        """Returns the input [b, t, q*h] of o_proj."""
        c = self.switches
        b, t, _ = x.shape
        queries, keys, values = (_project(params[f"{n}_proj"], x) for n in "qkv")
        if c.qk_norm == "projection":
            queries, keys = self._norm(params, "q_norm", queries), self._norm(params, "k_norm", keys)
        queries, keys, values = (each.reshape(b, t, -1, c.head_dim) for each in (queries, keys, values))
        if c.qk_norm == "head":
            queries, keys = self._norm(params, "q_norm", queries), self._norm(params, "k_norm", keys)
        if place.kind.rope is not None:
            tables = rotary_tables(place.kind.rope, c.rotated, place.positions, place.length, x.dtype)
            queries, keys = (rotate(each, tables, neighbours=self.neighbours) for each in (queries, keys))
        if c.query_scale_beta:
            passed = jnp.floor(place.positions.astype(jnp.float32) / c.query_scale_period)
            queries = queries * (1 + c.query_scale_beta * jnp.log1p(passed)).astype(x.dtype)[:, None, None]
        if self.scaled_queries:
            queries = queries * jnp.asarray(c.head_dim**0.5, queries.dtype)
        return attend(queries, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)).reshape(b, t, -1)


def build(config: DecoderConfig) -> DecoderModel:
    """Returns the Model of a config.

    Raises:
      InputError: it is no DecoderConfig.
    """
    if not isinstance(config, DecoderConfig):
        found = f"{type(config).__module__}.{type(config).__qualname__}"
        raise InputError(f"the model config is a {found}; parse_model_config reads a Hugging Face config dict")
    return DecoderModel(config)
