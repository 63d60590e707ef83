"""A Llama as people write it in Flax, once with linen and once with nnx. Written for this script."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from codebases.case import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    Case,
    Codebase,
    linen_case,
    nnx_case,
    rule,
    tokens,
)


def rotate(x: jax.Array) -> jax.Array:
    """Returns x [batch, length, heads, head_dim] with rotary position embeddings."""
    half = x.shape[-1] // 2
    positions, powers = jnp.arange(x.shape[1], dtype=x.dtype), jnp.arange(half, dtype=x.dtype) / half
    angles = positions[:, None] * 10000.0**-powers
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns causal attention [batch, length, width] of projections [batch, length, heads * HEAD_DIM]."""
    q, k, v = (x.reshape(*x.shape[:2], -1, HEAD_DIM) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return mixed.reshape(*mixed.shape[:2], -1)


class LinenBlock(nn.Module):
    """A decoder block."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the residual stream [batch, length, WIDTH] after the block."""
        h = nn.RMSNorm(name="input_layernorm")(x)
        q = nn.Dense(HEADS * HEAD_DIM, use_bias=False, name="q_proj")(h)
        k = nn.Dense(KV_HEADS * HEAD_DIM, use_bias=False, name="k_proj")(h)
        v = nn.Dense(KV_HEADS * HEAD_DIM, use_bias=False, name="v_proj")(h)
        x = x + nn.Dense(WIDTH, use_bias=False, name="o_proj")(attend(q, k, v))
        h = nn.RMSNorm(name="post_attention_layernorm")(x)
        gate = nn.Dense(HIDDEN, use_bias=False, name="gate_proj")(h)
        up = nn.Dense(HIDDEN, use_bias=False, name="up_proj")(h)
        return x + nn.Dense(WIDTH, use_bias=False, name="down_proj")(nn.silu(gate) * up)


class LinenLlama(nn.Module):
    """Blocks in a list made in setup."""

    def setup(self) -> None:
        """Makes the layers."""
        self.embed = nn.Embed(VOCAB, WIDTH)
        self.layers = [LinenBlock() for _ in range(LAYERS)]
        self.norm = nn.RMSNorm()
        self.lm_head = nn.Dense(VOCAB, use_bias=False)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns logits [batch, length, VOCAB]."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class NnxBlock(nnx.Module):
    """A decoder block."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def dense(d_in: int, d_out: int) -> nnx.Linear:
            return nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)

        self.input_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.q_proj = dense(WIDTH, HEADS * HEAD_DIM)
        self.k_proj = dense(WIDTH, KV_HEADS * HEAD_DIM)
        self.v_proj = dense(WIDTH, KV_HEADS * HEAD_DIM)
        self.o_proj = dense(HEADS * HEAD_DIM, WIDTH)
        self.post_attention_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate_proj, self.up_proj, self.down_proj = dense(WIDTH, HIDDEN), dense(WIDTH, HIDDEN), dense(HIDDEN, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the residual stream [batch, length, WIDTH] after the block."""
        h = self.input_layernorm(x)
        x = x + self.o_proj(attend(self.q_proj(h), self.k_proj(h), self.v_proj(h)))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h))


class NnxLlama(nnx.Module):
    """Blocks in an nnx.List."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns logits [batch, length, VOCAB]."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def linen_llama() -> Case:
    """A Llama of nn.Dense, as linen people write it."""
    model = LinenLlama()
    params = model.init(jax.random.key(0), tokens())["params"]
    return linen_case(model, params, (tokens(),), (rule(r"layers_\d+/.*_proj/kernel"),))


def nnx_llama() -> Case:
    """A Llama of nnx.Linear, as nnx people write it."""
    return nnx_case(NnxLlama(nnx.Rngs(0)), (rule(r"layers/\d+/.*_proj/kernel"),))


OWN_LLAMAS = (
    Codebase("linen-llama", "flax", "flax", "pip install flax", linen_llama),
    Codebase("nnx-llama", "flax", "flax", "pip install flax", nnx_llama),
)
