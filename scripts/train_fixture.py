"""Trains the small Llama of tests/fixtures/tiny_llama on the shipped text: `python scripts/train_fixture.py FOLDER`.

Byte-level BPE of 2048 pieces, a Llama of 2.4 million parameters, AdamW in float32 on whatever device JAX has; sixteen
CPU-minutes in all. Writes an ordinary Hugging Face folder with bfloat16 weights and prints how well it
predicts the held-out text. Compresses nothing.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tokenizers

from cluscomp_jax import data, llama
from cluscomp_jax.core import losses, trees
from cluscomp_jax.models.model import model_config_to_dict
from cluscomp_jax.models.tensor_names import is_transposed, names_of

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256
CONFIG = llama.LlamaConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    eos_token_id=(0,),
    initializer_range=0.05,
)
Params = dict[str, Any]


def train_tokenizer(text: str) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer of CONFIG.vocab_size pieces, END_OF_TEXT the first."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def model_loss(params: Params, tokens: jax.Array) -> jax.Array:
    """Returns the mean negative log-likelihood in nats, float32, of tokens[:, 1:] for int tokens [b, t]."""
    model = llama.LlamaModel(CONFIG)
    x = model.embed(params, tokens[:, :-1], dtype=jnp.float32)
    for i in range(model.num_blocks):
        x = model.block(trees.subtree(params, f"{model.blocks_path}/{i}"), x, layer_type=model.layer_type(i))
    return losses.token_nll(model.head(params, x), tokens[:, 1:]).mean()


def build_step(
    loss_of: Callable[[Params, jax.Array], jax.Array], optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Params, Any, jax.Array]]:
    """Returns the jitted step (params, state, tokens [b, t]) -> (params, state, loss)."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params, tokens)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    return step


def train(
    params: Params,
    loss_of: Callable[[Params, jax.Array], jax.Array],
    tokens: np.ndarray,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> Params:
    """Returns float32 params after `steps` of AdamW on random crops of CONTEXT targets.

    Args:
      params: where it begins.
      loss_of: (params, tokens int [b, t]) -> loss.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps, learning_rate / 50)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b2=0.98, weight_decay=0.1, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params)
        ),
    )
    state = optimizer.init(params)
    step = build_step(loss_of, optimizer)
    crops = np.random.default_rng(seed)
    started = time.monotonic()
    for number in range(1, steps + 1):
        starts = crops.integers(0, len(tokens) - CONTEXT, size=batch)
        params, state, loss = step(params, state, tokens[starts[:, None] + np.arange(CONTEXT + 1)])
        if number % 50 == 0:
            print(f"step {number}/{steps}  loss {float(loss):.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return params


def held_out_perplexity(params: Params, tokens: np.ndarray) -> float:
    """Returns exp of the mean loss over non-overlapping windows of CONTEXT tokens, each scored on all but its first."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    loss = jax.jit(model_loss)
    return math.exp(float(np.mean([loss(params, window[None]) for window in windows])))


def unigram_perplexity(train_tokens: np.ndarray, test_tokens: np.ndarray) -> float:
    """Returns the perplexity of guessing by frequency alone, one added to every count."""
    counts = np.bincount(train_tokens, minlength=CONFIG.vocab_size) + 1.0
    return math.exp(-np.mean(np.log(counts / counts.sum())[test_tokens]))


def write_folder(folder: Path, params: Params, tokenizer: tokenizers.Tokenizer, model_config: Any) -> None:
    """Writes config.json, model.safetensors (the dtype of params), tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        names_of(model_config, "hugging_face").name(path): np.ascontiguousarray(
            np.asarray(leaf).T if is_transposed(path) else leaf
        )
        for path, leaf in trees.flatten(params).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {**model_config_to_dict(model_config), "dtype": "bfloat16"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    for name, fields in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the Hugging Face folder goes; files of its names are replaced")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = train_tokenizer(data.text("wiki_train"))
    train_tokens, test_tokens = (
        np.asarray(tokenizer.encode(data.text(name)).ids, np.int32) for name in ("wiki_train", "wiki_test")
    )
    print(f"{len(train_tokens)} tokens to train on, {len(test_tokens)} held out")
    params = train(
        llama.init_params(CONFIG, jax.random.key(options.seed)),
        model_loss,
        train_tokens,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    write_folder(options.folder, stored, tokenizer, CONFIG)
    size = sum(leaf.size for leaf in jax.tree.leaves(stored))
    print(f"parameters {size}")
    print(f"perplexity on wiki_test, context {CONTEXT}: {held_out_perplexity(stored, test_tokens):.2f}")
    print(f"by frequencies alone: {unigram_perplexity(train_tokens, test_tokens):.1f}")


if __name__ == "__main__":
    main()
