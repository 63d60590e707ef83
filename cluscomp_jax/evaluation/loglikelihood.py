"""Log-likelihoods of continuations, batched by length. Sees a Decoder, no text.

Continuations of one context, such as the choices of a question, make a tree: the context and its longest continuation
are the trunk, one row of a pass; every other continuation is a branch, whose first token the trunk predicts and whose
other tokens pass after it, on a copy of the trunk's key-value cache. Logits exist for scored tokens alone.

Letters: b batch, t time, d model width, v vocabulary, p predicted tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.inference.decoder import Decoder, positions_held
from cluscomp_jax.inference.ragged import cached_rows
from cluscomp_jax.models.model import Cache, Model, check_length, run_block, run_embed

_STEP = 16
"""Lengths are padded to a multiple of it, so that few shapes are compiled."""
_MAX_BRANCHES = 4
"""Most branches of a pass for each of its trunks: every one holds a copy of a cache."""
_HEAD_TOKENS = 128
"""Positions whose logits exist at one time."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens to be scored after a context that has at least one token."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether greedy decoding would give it."""

    log_likelihood: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A context int32 [c] and its continuations {number of the request: int32 [n]}, the longest first."""

    context: np.ndarray
    tails: dict[int, np.ndarray]

    @property
    def trunk(self) -> np.ndarray:
        """What passes through the model in one row: the context, and of the longest continuation all but its end."""
        return np.concatenate([self.context, next(iter(self.tails.values()))[:-1]])

    @property
    def branches(self) -> dict[int, np.ndarray]:
        """The other continuations that have more than the token that the context predicts."""
        return {i: tail for i, tail in list(self.tails.items())[1:] if len(tail) > 1}


class _Predicted(NamedTuple):
    """`tokens` of request `number`, predicted in a pass by row `row` from column `begin` on."""

    number: int
    row: int
    begin: int
    tokens: np.ndarray


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
      batch_size: contexts per forward pass, >= 1, and up to four times as many further continuations of theirs;
        changes the speed only.
      max_length: most tokens that pass through the model.
      advance: called with the requests done since the last call.

    Raises:
      InputError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    trees = sorted(_trees(requests, max_length), key=lambda tree: (not tree.branches, -len(tree.trunk)))
    check_length(max((len(tree.trunk) for tree in trees), default=0), decoder.model, "context and continuation")
    log_likelihoods, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    branching = sum(bool(tree.branches) for tree in trees)
    for same in (trees[:branching], trees[branching:]):
        for begin in range(0, len(same), batch_size):
            chosen = same[begin : begin + batch_size]
            for x, predicted in _passes(decoder, chosen, batch_size):
                _add_scores(decoder, x, predicted, log_likelihoods, greedy)
            advance(sum(len(tree.tails) for tree in chosen))
    return [
        Score(float(total), bool(all_likeliest)) for total, all_likeliest in zip(log_likelihoods, greedy, strict=True)
    ]


def _trees(requests: Sequence[Continuation], max_length: int) -> list[_Tree]:
    """Returns the requests by their contexts, after what is left out of those."""
    sharing: dict[bytes, list[tuple[int, np.ndarray]]] = {}
    for i, request in enumerate(requests):
        count = len(request.tokens)
        if not len(request.context) or not 0 < count <= max_length:
            raise InputError(
                f"a continuation of {count} tokens after a context of {len(request.context)} cannot be scored; both "
                f"need a token, and the continuation at most {max_length}"
            )
        row = np.asarray([*request.context, *request.tokens][-(max_length + 1) :], np.int32)
        sharing.setdefault(row[:-count].tobytes(), []).append((i, row[-count:]))
    return [
        _Tree(np.frombuffer(context, np.int32), dict(sorted(members, key=lambda member: -len(member[1]))))
        for context, members in sharing.items()
    ]


def _passes(decoder: Decoder, trees: Sequence[_Tree], batch_size: int) -> Iterator[tuple[jax.Array, list[_Predicted]]]:
    """Yields (x [b, t, d] after the blocks, what it predicts) of the pass of all trunks and those of the branches."""
    trunks = [tree.trunk for tree in trees]
    inputs = _stacked(trunks, batch_size)
    predicted = []
    for row, tree in enumerate(trees):
        place = len(tree.context) - 1
        for number, tail in tree.tails.items():
            whole = number == next(iter(tree.tails))
            predicted.append(_Predicted(number, row, place, tail if whole else tail[:1]))
    branches = [(number, row, tail) for row, tree in enumerate(trees) for number, tail in tree.branches.items()]
    if not branches:
        yield _through_blocks(decoder, inputs), predicted
        return
    # Any branch may be in a pass as wide as the longest, and the cache must have room for all that is written.
    widest = _padded(max(len(tail) for _, _, tail in branches) - 1)
    positions = positions_held(max(max(len(tree.context) for tree in trees) + widest, inputs.shape[1]))
    caches = decoder.empty_caches(batch_size, positions)
    yield decoder.through_blocks(jnp.asarray(inputs), caches, None, _lengths(trunks, batch_size)), predicted
    branches.sort(key=lambda branch: -len(branch[2]))
    while branches:
        count = _pass_size([len(tail) - 1 for _, _, tail in branches], batch_size, positions)
        chosen, branches = branches[:count], branches[count:]
        predicted = [_Predicted(number, row, 0, tail[1:]) for row, (number, _, tail) in enumerate(chosen)]
        tails = [tail[:-1] for _, _, tail in chosen]
        owner, begin = np.zeros(count, np.int32), np.zeros(count, np.int32)
        owner[: len(chosen)] = [row for _, row, _ in chosen]
        begin[: len(chosen)] = [len(trees[row].context) for _, row, _ in chosen]
        yield (
            _branched(decoder, _stacked(tails, count), caches, owner, begin, begin + _lengths(tails, count)),
            predicted,
        )


def _pass_size(lengths: Sequence[int], batch_size: int, positions: int) -> int:
    """Returns how many of branches, longest first, pass together: those as wide as the first, about.

    It is `batch_size` times a power of two, so that few shapes are compiled; half the positions of the trunks' caches
    are as many as a pass should have at least.
    """
    width = _padded(lengths[0])
    wanted = min(sum(_padded(length) == width for length in lengths), batch_size * max(1, positions // (2 * width)))
    count = batch_size
    while count < wanted and count < _MAX_BRANCHES * batch_size:
        count *= 2
    return count


def _through_blocks(decoder: Decoder, inputs: np.ndarray) -> jax.Array:
    x: jax.Array = run_embed(decoder.outer, jnp.asarray(inputs), 0, model=decoder.model, dtype=decoder.dtype)
    for i, block in enumerate(decoder.blocks):
        x = run_block(block, x, model=decoder.model, layer_type=decoder.model.layer_type(i))
    return x


def _branched(
    decoder: Decoder,
    inputs: np.ndarray,
    caches: Sequence[Cache],
    owner: np.ndarray,
    begin: np.ndarray,
    lengths: np.ndarray,
) -> jax.Array:
    """Returns x [b, t, d] of rows that continue caches[:][owner[b]] at position begin[b], up to lengths[b] in all.

    Copies of one block's cache exist at a time.
    """
    x: jax.Array = run_embed(decoder.outer, jnp.asarray(inputs), begin, model=decoder.model, dtype=decoder.dtype)
    for i, block in enumerate(decoder.blocks):
        copies = _copies(caches[i], owner)
        x, _ = cached_rows(decoder.model, decoder.model.layer_type(i), block, x, copies, begin, lengths)
    return x


@jax.jit
def _copies(cache: Cache, owner: jax.Array) -> Cache:
    return {name: jnp.take(leaf, owner, axis=0) for name, leaf in cache.items()}


def _stacked(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Returns int32 [count, t] with the rows at its top left, t a multiple of `_STEP`."""
    stacked = np.zeros((count, _padded(max(len(row) for row in rows))), np.int32)
    for place, row in zip(stacked, rows, strict=False):
        place[: len(row)] = row
    return stacked


def _lengths(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Returns int32 [count]: the lengths of the rows, 1 after the last row."""
    lengths = np.ones(count, np.int32)
    lengths[: len(rows)] = [len(row) for row in rows]
    return lengths


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _add_scores(
    decoder: Decoder, x: jax.Array, predicted: Sequence[_Predicted], log_likelihoods: np.ndarray, greedy: np.ndarray
) -> None:
    """Adds the log-likelihoods of a pass, by request, and clears `greedy` where a token is not the likeliest."""
    counts = [len(p.tokens) for p in predicted]
    numbers = np.repeat([p.number for p in predicted], counts)
    rows = np.repeat([p.row for p in predicted], counts)
    columns = np.concatenate([np.arange(p.begin, p.begin + len(p.tokens)) for p in predicted])
    targets = np.concatenate([p.tokens for p in predicted])
    for start in range(0, len(numbers), _HEAD_TOKENS):
        part = slice(start, start + _HEAD_TOKENS)
        at = np.zeros((3, _HEAD_TOKENS), np.int32)
        at[:, : len(numbers[part])] = rows[part], columns[part], targets[part]
        hidden = _gathered(x, at[0], at[1])
        found, likeliest = map(np.asarray, _target_scores(decoder.outer, hidden, at[2], model=decoder.model))
        np.add.at(log_likelihoods, numbers[part], found[: len(numbers[part])].astype(np.float64))
        np.logical_and.at(greedy, numbers[part], likeliest[: len(numbers[part])])


@jax.jit
def _gathered(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    hidden: jax.Array = x[rows, columns]
    return hidden


@partial(jax.jit, static_argnames="model")
def _target_scores(
    outer: Params, hidden: jax.Array, targets: jax.Array, *, model: Model
) -> tuple[jax.Array, jax.Array]:
    """Returns (log-likelihood [p], whether most likely [p]) of targets int32 [p] after hidden [p, d]."""
    logits = model.head(outer, hidden[None])[0]
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == targets
