"""Log-likelihoods of continuations, batched by length. Sees a Decoder, no text.

Continuations of one context, such as the choices of a question, share its passage through the model.

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

_STEP = 16
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
    rows: list[np.ndarray] = []
    for request in requests:
        if not len(request.context) or not 0 < len(request.tokens) <= max_length:
            raise InputError(
                f"a continuation of {len(request.tokens)} tokens behind a context of {len(request.context)} cannot be "
                f"scored; both need a token, and the continuation at most {max_length}"
            )
        rows.append(np.asarray([*request.context, *request.tokens][-(max_length + 1) :], np.int32))
    counts = [len(request.tokens) for request in requests]
    sharing: dict[bytes, list[int]] = {}
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        sharing.setdefault(row[:-count].tobytes(), []).append(i)
    groups = sorted(sharing.values(), key=lambda members: (-len(members), -len(rows[members[0]])))
    scores: dict[int, Score] = {}
    for begin in range(0, len(groups), batch_size):
        chosen = groups[begin : begin + batch_size]
        alone = all(len(members) == 1 for members in chosen)
        x, ends = (
            _whole(decoder, rows, chosen, batch_size) if alone else _shared(decoder, rows, counts, chosen, batch_size)
        )
        members = [i for group in chosen for i in group]
        found = _scores(decoder, x, ends, [rows[i][-counts[i] :] for i in members])
        scores |= dict(zip(members, found, strict=True))
        advance(len(members))
    return [scores[i] for i in range(len(rows))]


def _whole(
    decoder: Decoder, rows: Sequence[np.ndarray], groups: Sequence[Sequence[int]], batch_size: int
) -> tuple[jax.Array, list[int]]:
    """Returns (x [batch_size, t, d] behind each whole row but its last token, the column before each row's end)."""
    chosen = [rows[i] for (i,) in groups]
    inputs = _stacked([row[:-1] for row in chosen], batch_size)
    x = run_embed(decoder.rest, jnp.asarray(inputs), model=decoder.model, dtype=decoder.dtype)
    for i, block in enumerate(decoder.blocks):
        x = run_block(block, x, model=decoder.model, kind=decoder.model.block_kind(i))
    return x, [len(row) - 1 for row in chosen]


def _shared(
    decoder: Decoder,
    rows: Sequence[np.ndarray],
    counts: Sequence[int],
    groups: Sequence[Sequence[int]],
    batch_size: int,
) -> tuple[jax.Array, list[int]]:
    """Returns what `_whole` does for all members of groups of one context each, which is computed once.

    A member's columns begin with the last token of its context.
    """
    contexts = [rows[group[0]][: -counts[group[0]]] for group in groups]
    tails = [rows[i][-counts[i] - 1 : -1] for group in groups for i in group]
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    width = batch_size * max(len(group) for group in groups)
    inputs, tokens = _stacked([context[:-1] for context in contexts], batch_size), _stacked(tails, width)
    lengths = np.zeros(batch_size, np.int32)
    lengths[: len(contexts)] = [len(context) - 1 for context in contexts]
    caches = decoder.empty_caches(batch_size, inputs.shape[1] + tokens.shape[1])
    decoder.through_blocks(jnp.asarray(inputs), caches, None, lengths)
    owner = np.zeros(width, np.int32)
    owner[: len(owners)] = owners
    copies = [jax.tree.map(lambda leaf: leaf[owner], cache) for cache in caches]
    ends = np.zeros(width, np.int32)
    ends[: len(tails)] = [len(tail) for tail in tails]
    x = decoder.through_blocks(jnp.asarray(tokens), copies, lengths[owner], lengths[owner] + ends)
    return x, [len(tail) for tail in tails]


def _stacked(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Returns int32 [count, t] with the rows at its top left, t a multiple of `_STEP`."""
    stacked = np.zeros((count, _padded(max(1, *(len(row) for row in rows)))), np.int32)
    for place, row in zip(stacked, rows, strict=False):
        place[: len(row)] = row
    return stacked


def _scores(decoder: Decoder, x: jax.Array, ends: Sequence[int], continuations: Sequence[np.ndarray]) -> list[Score]:
    """Returns the scores of continuations whose tokens are predicted by the last columns of x before each end."""
    targets = _stacked(continuations, len(x))
    at = np.zeros_like(targets)
    for place, end, tokens in zip(at, ends, continuations, strict=False):
        place[: len(tokens)] = np.arange(end - len(tokens), end)
    log_likelihoods, greedy = map(np.asarray, _target_scores(decoder.rest, x, at, targets, model=decoder.model))
    return [
        Score(float(log_likelihoods[i, : len(tokens)].sum(dtype=np.float64)), bool(greedy[i, : len(tokens)].all()))
        for i, tokens in enumerate(continuations)
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
