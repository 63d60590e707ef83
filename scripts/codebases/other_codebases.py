"""Codebases outside Flax: keras-hub, equinox and jax-llm-examples. Each function makes one tiny random model."""

import os

import jax
import jax.numpy as jnp

from codebases.case import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LENGTH,
    VOCAB,
    WIDTH,
    Case,
    Codebase,
    randomized,
    rule,
    tokens,
)

# Keras reads it once, and other codebases import Keras too.
os.environ.setdefault("KERAS_BACKEND", "jax")


def keras_hub_llama3() -> Case:
    """Llama 3 of keras-hub (parameters are a list; here a dict by their paths)."""
    import keras_hub

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=VOCAB,
        num_layers=LAYERS,
        num_query_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        hidden_dim=WIDTH,
        intermediate_dim=HIDDEN,
    )
    model = keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)
    params = randomized({variable.path: variable.value for variable in model.trainable_variables})
    rest = [variable.value for variable in model.non_trainable_variables]

    def forward(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        inputs = {"token_ids": ids, "padding_mask": jnp.ones_like(ids)}
        in_order = [params[variable.path] for variable in model.trainable_variables]
        return model.stateless_call(in_order, rest, inputs)[0]

    rules = (
        rule(r".*/self_attention/(query|key|value)/kernel", "d n h -> | d | n h"),
        rule(r".*/self_attention/attention_output/kernel", "n h d -> | n h | d"),
        rule(r".*/feedforward_\w+_dense/kernel"),
    )
    return Case(params, (tokens(),), forward, rules)


def equinox_transformer() -> Case:
    """A transformer of equinox's layers ([out, in], one example at a time under vmap)."""
    import equinox as eqx

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP
        norms: list[eqx.nn.LayerNorm]

        def __init__(self, key: jax.Array) -> None:
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key)
            self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, activation=jax.nn.gelu, key=key)
            self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]

        def __call__(self, x: jax.Array) -> jax.Array:
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
            return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

    class Transformer(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: list[Block]
        head: eqx.nn.Linear

        def __call__(self, ids: jax.Array) -> jax.Array:
            x = jax.vmap(self.embed)(ids)
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.head)(x)

    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    blocks = [Block(key) for key in keys[:LAYERS]]
    model = Transformer(eqx.nn.Embedding(VOCAB, WIDTH, key=keys[-1]), blocks, eqx.nn.Linear(WIDTH, VOCAB, key=keys[-2]))
    params, static = eqx.partition(model, eqx.is_array)
    rules = (rule(r"blocks/\d+/(attention/\w+_proj|mlp/layers/\d+)/weight", "o i -> | i | o"),)
    return Case(randomized(params), (tokens(),), lambda p, ids: jax.vmap(eqx.combine(p, static))(ids), rules)


def jax_llm_examples_llama3() -> Case:
    """Llama 3 of jax-llm-examples (registered dataclasses, plain functions, an Explicit mesh)."""
    from llama3_jax import model

    mesh = jax.make_mesh((1, 1, 1), ("x", "y", "z"), axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    config = model.Config(
        embed=WIDTH,
        ffw_size=HIDDEN,
        q_heads=HEADS,
        kv_heads=KV_HEADS,
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        max_seq_len=16,
        causal=True,
        use_prefill_attn_kernel=False,
        use_decode_attn_kernel=False,
        dtype=jnp.float32,
        mesh=mesh,
        quant_layer=False,
        quant_cache=False,
    )
    with jax.set_mesh(mesh):
        params = randomized(model.Weights.init(jax.random.key(0), config))
    rules = (
        rule(r"layers/\d+/[qkv]", "d n h -> | d | n h"),
        rule(r"layers/\d+/o", "n h d -> | n h | d"),
        rule(r"layers/\d+/w_(gate|up|down)"),
    )

    def forward(weights: object, ids: jax.Array) -> jax.Array:
        return model.forward(ids, jnp.ones_like(ids), weights, config)[0]

    return Case(params, (tokens(),), forward, rules, lambda: jax.set_mesh(mesh))


OTHER_CODEBASES = (
    Codebase("keras-hub-llama3", "keras_hub", "keras-hub", "pip install keras-hub", keras_hub_llama3),
    Codebase("equinox", "equinox", "equinox", "pip install equinox", equinox_transformer),
    Codebase(
        "jax-llm-examples",
        "llama3_jax",
        "llama3_jax",
        'pip install "git+https://github.com/jax-ml/jax-llm-examples#subdirectory=llama3"',
        jax_llm_examples_llama3,
    ),
)
