"""Compares a Llama of tunix, compressed through `compress_blocks`, with the same weights through `compress`.

The weights are those of tests/fixtures/tiny_llama, trained on wiki_train. tunix runs its own forward pass, before and
after. Prints the perplexity of wiki_test of each, and fails where those of the two results differ by more than 1%.
Needs google-tunix: pip install -r requirements/codebases.txt
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cluscomp_jax
from cluscomp_jax import CompressConfig, CompressionRule, compress_blocks, llama, with_codebooks
from cluscomp_jax.core import trees
from cluscomp_jax.models.source import load_all

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/fixtures/tiny_llama"
SAMPLES, LENGTH, EVALUATED = 64, 128, 64
NUM_CODES = 256
LIMIT = 0.01
RULES = (
    CompressionRule(pattern="attn/[qkv]_proj/w", num_codes=NUM_CODES, axes="d n h -> | d | n h"),
    CompressionRule(pattern="attn/o_proj/w", num_codes=NUM_CODES, axes="n h d -> | n h | d"),
    CompressionRule(pattern="mlp/.*_proj/kernel", num_codes=NUM_CODES),
)


def main() -> int:
    from tunix.models.llama3 import model as tunix

    source, config, text = open_fixture()
    params = load_all(source, llama.build(config))
    calibration, tokens = text["wiki_train"][:SAMPLES], text["wiki_test"][:EVALUATED]
    host = to_tunix(tunix, params, config)
    cfg = CompressConfig(
        model=config,
        cluster=cluscomp_jax.ClusterConfig(rules=(CompressionRule(num_codes=NUM_CODES),)),
        calibration=cluscomp_jax.CalibrationConfig(samples=SAMPLES, length=LENGTH),
    )
    own = cluscomp_jax.compress(params, cfg, calibration=calibration)
    apply = block_of(LENGTH)
    inputs = np.asarray(host.embedder.encode(jnp.asarray(calibration)))
    blocks, summary = compress_blocks(list(host.layers), apply, inputs, cfg, rules=RULES)
    result = replaced(host, blocks)
    found = {
        "original, cluscomp_jax": perplexity(lambda p, t: llama.forward(p, t, config), params, tokens),
        "original, tunix": perplexity(call, host, tokens),
        "compress, cluscomp_jax": perplexity(lambda p, t: llama.forward(p, t, config), own, tokens),
        "compress_blocks, tunix": perplexity(with_codebooks(call), result, tokens),
    }
    for name, value in found.items():
        print(f"{name:24} perplexity {value:.3f}")
    *_, one, other = found.values()
    difference = abs(other / one - 1)
    print(
        f"{summary.bits_per_weight:.2f} bits per weight; the results differ by {difference:.2%} (at most {LIMIT:.0%})"
    )
    return int(difference > LIMIT)


def open_fixture() -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Returns (the source of its parameters, its config, {text: tokens [rows, LENGTH]})."""
    opened, rows = cluscomp_jax.open_model(str(FIXTURE)), {}
    # tunix 0.1.7 has this theta, whatever its config says.
    config = dataclasses.replace(opened.config, rope=llama.RopeConfig(theta=1e6))
    tokenizer = opened.load_tokenizer()
    for name in ("wiki_train", "wiki_test"):
        tokens = cluscomp_jax.load_tokens(ROOT / f"cluscomp_jax/data/{name}.txt.gz", tokenizer)
        rows[name] = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return opened.source, config, rows


def to_tunix(tunix: Any, params: Any, config: Any) -> Any:
    """Returns the Llama3 of tunix with these weights."""
    host = tunix.Llama3(
        tunix.ModelConfig(
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_key_value_heads,
            rope_theta=int(config.rope.theta),
            norm_eps=config.rms_norm_eps,
            weight_tying=config.tie_word_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )
    flat = trees.flatten(params)
    set_value(host.embedder.input_embedding, flat["model/embed_tokens/embedding"])
    set_value(host.final_norm.w, flat["model/norm/weight"])
    if not config.tie_word_embeddings:
        set_value(host.lm_head.w, flat["lm_head/kernel"])
    for i, layer in enumerate(host.layers):
        path = f"model/layers/{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            set_value(getattr(layer.attn, name).w, flat[f"{path}/self_attn/{name}/kernel"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            set_value(getattr(layer.mlp, name).kernel, flat[f"{path}/mlp/{name}/kernel"])
        set_value(layer.input_layernorm.w, flat[f"{path}/input_layernorm/weight"])
        set_value(layer.post_attention_layernorm.w, flat[f"{path}/post_attention_layernorm/weight"])
    return host


def set_value(variable: Any, value: Any) -> None:
    """Gives a Variable of the host our array, in its own shape."""
    variable[...] = jnp.asarray(value, jnp.float32).reshape(variable.shape)


def masks(length: int, batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns (positions [b, t], the causal mask [b, t, t])."""
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return positions, jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))


def block_of(length: int) -> Any:
    """Returns a layer of tunix as a function (layer, x [b, t, d]) -> y."""

    def apply(layer: Any, x: jax.Array) -> jax.Array:
        positions, mask = masks(length, x.shape[0])
        y: jax.Array = layer(x, positions, None, mask)[1]
        return y

    return apply


def call(model: Any, tokens: jax.Array) -> jax.Array:
    """Returns the logits [b, t, v] of the host's own forward pass."""
    positions, mask = masks(tokens.shape[1], tokens.shape[0])
    logits: jax.Array = model(tokens, positions, None, mask)[0]
    return logits


def replaced(host: Any, blocks: list[Any]) -> Any:
    """Returns the host with these layers."""
    copy = nnx.clone(host)
    for i, block in enumerate(blocks):
        copy.layers[i] = block
    return copy


def perplexity(forward: Any, params: Any, tokens: np.ndarray) -> float:
    """Returns the perplexity of tokens [rows, t], every row by itself."""

    @jax.jit
    def loss(params: Any, row: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(forward(params, row[None]).astype(jnp.float32))[0, :-1]
        return -jnp.take_along_axis(scores, row[1:, None], axis=1).mean()

    return float(np.exp(np.mean([float(loss(params, jnp.asarray(row))) for row in tokens])))


if __name__ == "__main__":
    sys.exit(main())
