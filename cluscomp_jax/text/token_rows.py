"""Rows of tokens to train on, and the order they come in. Arrays only: knows no text, no tokenizer and no model.

The order is a function of the seed and the step, so the position in the data is the number of steps done: a run that
resumes needs no other state.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from cluscomp_jax.errors import InputError

_SHOWN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows of tokens, and which of them are predicted.

    Attributes:
      tokens: int32 [n, t], n >= 1, t >= 2.
      loss_mask: bool [n, t]; every row has one that is true after its first position, which nothing predicts.
      lines: int [n], the line from 1 of the file that each row comes from; None where rows have no line of their own.
      left_out: int [m], the lines that gave no row.

    Raises:
      InputError: these do not hold; a row is named by its number from 0.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    lines: np.ndarray | None = None
    left_out: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not np.issubdtype(self.tokens.dtype, np.integer):
            found = f"{self.tokens.dtype} {list(self.tokens.shape)}"
            raise InputError(f"training tokens are {found}; they must be integers [rows, length]")
        if self.tokens.shape[0] < 1 or self.tokens.shape[1] < 2:
            raise InputError(f"training tokens are {list(self.tokens.shape)}; give 1 row or more of 2 tokens or more")
        if self.loss_mask.shape != self.tokens.shape or self.loss_mask.dtype != bool:
            raise InputError(
                f"loss_mask is {self.loss_mask.dtype} {list(self.loss_mask.shape)}; "
                f"it must be bool {list(self.tokens.shape)}"
            )
        if self.lines is not None:
            integers = np.issubdtype(self.lines.dtype, np.integer)
            if self.lines.shape != self.tokens.shape[:1] or not integers:
                found = f"{self.lines.dtype} {list(self.lines.shape)}"
                raise InputError(f"lines are {found}; they must be integers, one to each of {len(self.tokens)} rows")
        unscored = np.flatnonzero(~self.loss_mask[:, 1:].any(axis=1))
        if len(unscored):
            raise InputError(f"row {unscored[0]} has no scored token after its first; leave it out")

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray) -> "TokenRows":
        """Returns the rows of these numbers, in that order."""
        return TokenRows(self.tokens[rows], self.loss_mask[rows], None if self.lines is None else self.lines[rows])

    def describe(self, rows: np.ndarray) -> str:
        """Returns a phrase of where the rows of these numbers come from; of many, the first few."""
        what, numbers = ("rows", rows) if self.lines is None else ("lines", self.lines[rows])
        return f"{what} {first_few(numbers)} of " + ("those that were read, from 0" if what == "rows" else "the file")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hex digest of shape and contents."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens, "<i4").tobytes())
        digest.update(np.packbits(self.loss_mask).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked, int [t], and the text it should answer; `where` names it for a person."""

    prompt: np.ndarray
    answer: str
    where: str


def first_few(numbers: np.ndarray) -> str:
    """Returns the first few of some numbers, and how many more there are."""
    more = f" and {len(numbers) - _SHOWN_ROWS} more" * (len(numbers) > _SHOWN_ROWS)
    return ", ".join(map(str, numbers[:_SHOWN_ROWS])) + more


def pack(tokens: np.ndarray, length: int) -> TokenRows:
    """Returns running text int [t] as rows of `length`, all scored; a shorter last one is dropped.

    Raises:
      InputError: less than one row.
    """
    tokens = np.asarray(tokens)
    rows = len(tokens) // length
    if not rows:
        raise InputError(
            f"the text has {len(tokens)} tokens, one row takes {length}; give more text or a smaller length"
        )
    packed = tokens[: rows * length].reshape(rows, length).astype(np.int32)
    return TokenRows(packed, np.ones_like(packed, bool))


def pad(
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]],
    length: int,
    lines: np.ndarray | None = None,
    left_out: np.ndarray | None = None,
) -> TokenRows:
    """Returns (tokens, scored) pairs of at most `length` as rows; their ends are padded with token 0, not scored.

    Args:
      rows: at least one.
      length: tokens per row.
      lines: as in TokenRows.
      left_out: as in TokenRows; None: none.
    """
    tokens = np.zeros((len(rows), length), np.int32)
    loss_mask = np.zeros((len(rows), length), bool)
    for i, (ids, counts) in enumerate(rows):
        tokens[i, : len(ids)] = ids
        loss_mask[i, : len(ids)] = counts
    return TokenRows(tokens, loss_mask, lines, np.empty(0, np.int64) if left_out is None else left_out)


@runtime_checkable
class Batches(Protocol):
    """Hands out the rows of each step; of the same step always the same ones."""

    def batch(self, step: int) -> TokenRows:
        """The rows of step `step`, counted from 0: `batch_size * accumulation` of them, all of one length."""
        ...

    def describe(self, step: int) -> str:
        """Where the rows of a step come from, in a phrase for a person who has to look at them."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hex digest that changes when any batch does."""
        ...


@dataclasses.dataclass(frozen=True)
class ShuffledBatches:
    """All rows in a new random order, and again in another: batches are cut from that endless sequence.

    Attributes:
      examples: the rows.
      rows_per_step: rows per batch, >= 1; may exceed the number of rows.
      seed: non-negative; with the number of the pass it fixes the order of that pass.
    """

    examples: TokenRows
    rows_per_step: int
    seed: int

    def rows(self, step: int) -> np.ndarray:
        """Returns the numbers int64 [rows_per_step] of the rows of a step."""
        places = step * self.rows_per_step + np.arange(self.rows_per_step)
        passes, inside = np.divmod(places, len(self.examples))
        return np.array([self._order(int(p))[i] for p, i in zip(passes, inside, strict=True)])

    def batch(self, step: int) -> TokenRows:
        """Returns the rows of a step."""
        return self.examples.take(self.rows(step))

    def describe(self, step: int) -> str:
        """Returns a phrase of where the rows of a step come from."""
        return self.examples.describe(self.rows(step))

    @property
    def fingerprint(self) -> str:
        """A hex digest of the rows and of what orders them."""
        return hashlib.sha256(f"{self.examples.fingerprint} {self.rows_per_step} {self.seed}".encode()).hexdigest()

    def _order(self, number: int) -> np.ndarray:
        return _permutation(len(self.examples), self.seed, number)


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(count)
