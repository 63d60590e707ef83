"""Log-likelihoods of continuations, batched by length. Sees a Decoder's parameters and its Model, no text.

Letters: b batch, t time, d model width, v vocabulary, c continuation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.generation import Decoder
from cluscomp_jax.model import Model, run_block, run_embed
from cluscomp_jax.trees import Params

_STEP = 32
"""Lengths are padded to a multiple of it, so that few shapes are compiled."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens to be scored behind a context that has at least one token."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether greedy decoding would give it."""

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    decoder: Decoder,
    requests: Sequence[Continuation],
    *,
    batch_size: int,
    max_length: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Returns the score of every request, in their order; the longest are computed first.

    Args:
      decoder: the model.
      requests: what to score. Of contexts that are too long the front is left out.
      batch_size: requests per forward pass, >= 1; changes the speed only.
      max_length: most tokens that pass through the model.
      advance: called with the requests done since the last call.

    Raises:
      InputError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    rows = []
    for request in requests:
        if not len(request.context) or not 0 < len(request.tokens) <= max_length:
            raise InputError(
                f"a continuation of {len(request.tokens)} tokens behind a context of {len(request.context)} cannot be "
                f"scored; both need a token, and the continuation at most {max_length}"
            )
        rows.append(np.asarray([*request.context, *request.tokens][-(max_length + 1) :], np.int32))
    counts = [len(request.tokens) for request in requests]
    scores: list[Score | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        found = _score_batch(decoder, [rows[i] for i in chosen], [counts[i] for i in chosen], batch_size)
        for i, score in zip(chosen, found, strict=True):
            scores[i] = score
        advance(len(chosen))
    return [score for score in scores if score is not None]


def _score_batch(decoder: Decoder, rows: list[np.ndarray], counts: list[int], batch_size: int) -> list[Score]:
    """Returns the scores of rows of tokens, each by its last `count` ones."""
    width, last = _padded(max(map(len, rows)) - 1), _padded(max(counts))
    inputs = np.zeros((batch_size, width), np.int32)
    at, targets = np.zeros((2, batch_size, last), np.int32)
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        inputs[i, : len(row) - 1] = row[:-1]
        at[i, :count] = np.arange(len(row) - 1 - count, len(row) - 1)
        targets[i, :count] = row[len(row) - count :]
    x = run_embed(decoder.rest, jnp.asarray(inputs), model=decoder.model, dtype=decoder.dtype)
    for i, block in enumerate(decoder.blocks):
        x = run_block(block, x, model=decoder.model, kind=decoder.model.block_kind(i))
    log_likelihoods, greedy = map(np.asarray, _target_scores(decoder.rest, x, at, targets, model=decoder.model))
    return [
        Score(float(log_likelihoods[i, :count].sum(dtype=np.float64)), bool(greedy[i, :count].all()))
        for i, count in enumerate(counts)
    ]


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP


@partial(jax.jit, static_argnames="model")
def _target_scores(
    rest: Params, x: jax.Array, at: jax.Array, targets: jax.Array, *, model: Model
) -> tuple[jax.Array, jax.Array]:
    """Returns (log-likelihood [b, c], whether most likely [b, c]) of targets [b, c] behind columns at [b, c] of x.

    One row's logits are held at a time: those of a batch would be [b, c, v].
    """

    def row(arguments: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, columns, wanted = arguments
        logits = model.head(rest, hidden[columns][None])[0]
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == wanted

    scores: tuple[jax.Array, jax.Array] = jax.lax.map(row, (x, at, targets))
    return scores
