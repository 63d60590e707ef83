"""Perplexity against a float64 reading of the definition."""

import dataclasses

import jax
import numpy as np
import pytest

from cluscomp_jax import llama
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.perplexity import perplexity

CONFIG = llama.LlamaConfig(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return llama.init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 60, 1100)


@pytest.mark.parametrize(("context", "batch_size"), [(50, 1), (50, 4), (1100, 1), (530, 2)])
def test_perplexity_is_the_exponential_of_the_mean_over_scored_targets(params, tokens, context, batch_size):
    result = perplexity(params, tokens, CONFIG, context=context, batch_size=batch_size)
    windows = len(tokens) // context
    losses = []
    for k in range(windows):
        window = tokens[k * context : (k + 1) * context]
        logits = np.asarray(llama.forward(params, window[None], CONFIG)[0], np.float64)
        top = logits.max(-1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        losses.extend(-log_p[np.arange(context - 1), window[1:]])
    np.testing.assert_allclose(result.nll, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(result.perplexity, np.exp(np.mean(losses)), rtol=1e-5)
    assert (result.windows, result.tokens, result.context) == (windows, len(losses), context)


def test_the_same_call_gives_the_same_number(params, tokens):
    first, again = (perplexity(params, tokens, CONFIG, context=100).nll for _ in range(2))
    assert first == again


def test_layers_may_be_numbered_with_integers(params, tokens):
    numbered = {**params, "model": {**params["model"]}}
    numbered["model"]["layers"] = {int(i): block for i, block in params["model"]["layers"].items()}
    assert perplexity(numbered, tokens, CONFIG, context=100).nll == perplexity(params, tokens, CONFIG, context=100).nll


def test_bfloat16_compute_is_close(params, tokens):
    wide = perplexity(params, tokens, CONFIG, context=100).nll
    narrow = perplexity(params, tokens, CONFIG, context=100, dtype="bfloat16").nll
    assert abs(wide - narrow) < 0.02 * wide


@pytest.mark.parametrize(
    ("tokens", "context", "message"),
    [
        (np.zeros(99, np.int32), 100, "99 tokens, a window of 100"),
        (np.zeros(99, np.int32), 1, "context is 1"),
        (np.full(99, 60), 50, "token 60 is outside the vocabulary, 0 to 59"),
        (np.full(99, -1), 50, "token -1 is outside"),
        (np.zeros(99), 50, "float64"),
        (np.zeros((2, 99), np.int32), 50, "shape (2, 99)"),
    ],
)
def test_bad_input_is_named(params, tokens, context, message):
    with pytest.raises(InputError) as error:
        perplexity(params, tokens, CONFIG, context=context)
    assert message in str(error.value)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -1}, {"dtype": "int32"}])
def test_an_argument_out_of_its_range_is_named(params, tokens, wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is "):
        perplexity(params, tokens, CONFIG, context=100, **wrong)


def test_a_tree_with_the_wrong_number_of_blocks_is_refused(params, tokens):
    deeper = dataclasses.replace(CONFIG, num_hidden_layers=3, layer_types=())
    with pytest.raises(InputError, match="2 blocks, the model config says 3"):
        perplexity(params, tokens, deeper, context=100)
