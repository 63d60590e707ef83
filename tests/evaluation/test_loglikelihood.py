"""Log-likelihoods of continuations next to whole forward passes, one request at a time."""

from typing import Any

import jax
import numpy as np
import pytest

from cluscomp_jax import llama
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.loglikelihood import Continuation, score_continuations
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.models.llama import LlamaConfig
from cluscomp_jax.models.source import as_source

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.4,
)
PARAMS = llama.init_params(CONFIG, jax.random.key(1))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = llama.build(CONFIG)
    return Decoder.load(as_source(PARAMS, model), model, dtype="float32", decode_weights="once")


def oracle(context: list[int], tokens: list[int]) -> tuple[float, bool]:
    row = np.asarray([*context, *tokens])
    logits = np.asarray(llama.forward(PARAMS, row[None], CONFIG))[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = range(len(context) - 1, len(row) - 1)
    return sum(logits[p, row[p + 1]] for p in places), all(logits[p].argmax() == row[p + 1] for p in places)


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(40, size=count).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_whole_passes(decoder: Decoder, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    requests = [
        Continuation(random_tokens(rng, c), random_tokens(rng, t)) for c, t in [(1, 1), (20, 3), (5, 17), (33, 1)]
    ]
    for length in (1, 7, 18):  # each context with several continuations of different lengths
        context = random_tokens(rng, length)
        requests += [Continuation(context, random_tokens(rng, t)) for t in (1, 4, 17)]
    likely = int(np.asarray(llama.forward(PARAMS, np.asarray([[3, 4]]), CONFIG))[0, -1].argmax())
    requests += [Continuation([3, 4], [likely]), Continuation([3, 4], [(likely + 1) % 40])]
    done: list[int] = []
    found = score_continuations(decoder, requests, batch_size=batch_size, max_length=64, advance=done.append)
    assert sum(done) == len(requests)
    for request, score in zip(requests, found, strict=True):
        want, greedy = oracle(list(request.context), list(request.tokens))
        assert score.log_likelihood == pytest.approx(want, abs=1e-4)
        assert score.is_greedy == greedy
    assert [score.is_greedy for score in found[-2:]] == [True, False]


def test_a_short_branch_in_a_wide_pass_finds_room_in_the_cache(decoder: Decoder) -> None:
    rng = np.random.default_rng(2)
    requests = []
    for length, tails in ((30, (3, 3)), (2, (18, 17))):  # 30 + 16 columns fit in 64, 2 + 17 in 32
        context = random_tokens(rng, length)
        requests += [Continuation(context, random_tokens(rng, t)) for t in tails]
    found = score_continuations(decoder, requests, batch_size=2, max_length=64)
    for request, score in zip(requests, found, strict=True):
        want, _ = oracle(list(request.context), list(request.tokens))
        assert score.log_likelihood == pytest.approx(want, abs=1e-4)


def test_the_front_of_a_long_context_is_left_out(decoder: Decoder) -> None:
    row = random_tokens(np.random.default_rng(1), 30)
    (found,) = score_continuations(decoder, [Continuation(row[:25], row[25:])], batch_size=2, max_length=9)
    assert found.log_likelihood == pytest.approx(oracle(row[20:25], row[25:])[0], abs=1e-4)


@pytest.mark.parametrize(("context", "tokens"), [([], [1]), ([1], []), ([1], [1] * 10)])
def test_what_cannot_be_scored_is_refused(decoder: Decoder, context: Any, tokens: Any) -> None:
    with pytest.raises(InputError, match="cannot be scored"):
        score_continuations(decoder, [Continuation(context, tokens)], batch_size=1, max_length=9)
    assert score_continuations(decoder, [], batch_size=1, max_length=9) == []
