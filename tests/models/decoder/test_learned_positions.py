"""A model with a table of learned positions: every way to its embeddings finds the right rows, and none beyond them.

The table has 24 positions, so the padding of prompts, rows and branches reaches past its end.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import fields_of, random_params

from cluscomp_jax import (
    CalibrationConfig,
    ClusterConfig,
    CompressConfig,
    CompressionRule,
    Embeddings,
    compress,
    generate,
)  # fmt: skip
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.loglikelihood import Continuation, score_continuations
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.models.decoder import DecoderConfig, forward
from cluscomp_jax.models.model import build_model, parse_model_config, run_embed
from cluscomp_jax.models.source import as_source

POSITIONS = 24
CASES = ("opt", "opt_post_norm")


def problem(name: str) -> tuple[DecoderConfig, Any]:
    config = parse_model_config(fields_of(name) | {"max_position_embeddings": POSITIONS, "num_hidden_layers": 2})
    return config, random_params(config)


def tokens_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, shape).astype(np.int32)


@pytest.mark.parametrize("name", CASES)
def test_the_embedding_is_that_of_token_and_position(name: str) -> None:
    config, params = problem(name)
    outer = {group: params[group] for group in params}
    table = outer["model"]["embed_positions"]["embedding"]
    assert table.shape == (POSITIONS + 2, config.hidden_size)
    tokens, starts = tokens_of((2, 3)), np.asarray([4, 19], np.int32)
    found = run_embed(outer, tokens, starts, model=build_model(config), dtype=jnp.dtype("float32"))
    for row in range(2):
        for column in range(3):
            word = outer["model"]["embed_tokens"]["embedding"][tokens[row, column]]
            if name == "opt_post_norm":
                word = word @ outer["model"]["project_in"]["kernel"]
            np.testing.assert_allclose(found[row, column], word + table[2 + starts[row] + column], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_prompts_of_different_lengths_give_the_tokens_of_the_whole_pass(name: str) -> None:
    config, params = problem(name)
    prompts = [tokens_of((length,), length) for length in (18, 1, 7)]
    drawn = generate(params, prompts, config, max_new_tokens=6)  # the first prompt is padded to 32 and fills the table
    for prompt, row in zip(prompts, drawn, strict=True):
        whole = np.concatenate([prompt, row])[None]
        logits = np.asarray(forward(params, whole, config))[0]
        np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), row)


@pytest.mark.parametrize("name", CASES)
def test_continuations_have_the_scores_of_the_whole_pass(name: str) -> None:
    config, params = problem(name)
    model = build_model(config)
    decoder = Decoder.load(as_source(params, model), model, dtype="float32", decode_weights="once")
    shared, alone = tokens_of((15,), 1), tokens_of((20,), 2)
    pairs = [(shared, tokens_of((count,), 3 + count)) for count in (9, 2, 6)] + [(alone, tokens_of((4,), 9))]
    requests = [Continuation(context.tolist(), tokens.tolist()) for context, tokens in pairs]
    found = score_continuations(decoder, requests, batch_size=2, max_length=POSITIONS)
    for (context, tokens), score in zip(pairs, found, strict=True):
        row = np.concatenate([context, tokens])
        logits = np.asarray(forward(params, row[None], config), np.float64)[0]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(len(context) - 1, len(row) - 1)
        assert score.log_likelihood == pytest.approx(logs[places, row[places + 1]].sum(), abs=1e-3)


def compressing(config: DecoderConfig, length: int) -> CompressConfig:
    rule = CompressionRule(group_size=4, num_codes=16)
    return CompressConfig(
        model=config,
        cluster=ClusterConfig(rules=(rule,), iterations=2, refine_rounds=1),
        tuning=BlockTuningConfig(epochs=1),
        calibration=CalibrationConfig(samples=4, length=length),
    )


def test_embeddings_for_calibration_have_their_positions_in_them() -> None:
    config, params = problem("opt_post_norm")
    tokens = tokens_of((4, 12))
    outer = {"model": {name: leaf for name, leaf in params["model"].items() if name != "layers"}}
    inputs = np.asarray(run_embed(outer, tokens, model=build_model(config), dtype=jnp.dtype("float32")))
    cfg = compressing(config, 12)
    of_tokens = compress(params, cfg, calibration=tokens)
    of_embeddings = compress(params, cfg, calibration=Embeddings(inputs, None, tokens))
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, tree) for tree in (of_tokens, of_embeddings)))


def test_sequences_beyond_the_table_are_refused_in_one_line() -> None:
    config, params = problem("opt")
    model, long = build_model(config), tokens_of((4, POSITIONS + 1))
    decoder = Decoder.load(as_source(params, model), model, dtype="float32", decode_weights="once")
    far = Continuation(long[0, :20].tolist(), [*long[0, 20:].tolist(), 1])
    tries: dict[str, Any] = {
        "a sequence": lambda: forward(params, long, config),
        "context": lambda: perplexity(params, long.reshape(-1), config, context=POSITIONS + 1),
        "calibration": lambda: compress(params, compressing(config, POSITIONS + 1), calibration=long),
        "context and continuation": lambda: score_continuations(decoder, [far], batch_size=1, max_length=30),
    }
    for what, call in tries.items():
        with pytest.raises(InputError, match=rf"^{what}: 25 positions, and the model has learned 24; make it 24"):
            call()
    with pytest.raises(InputError, match="exceed the model's context of 24"):
        generate(params, long[0, :20], config, max_new_tokens=5)
    forward(params, long[:, :POSITIONS], config)
    compress(params, compressing(config, POSITIONS), calibration=long[:, :POSITIONS])
