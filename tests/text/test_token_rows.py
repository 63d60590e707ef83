"""Rows of tokens and their order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.errors import InputError
from cluscomp_jax.text.token_rows import ShuffledBatches, TokenRows, pack, pad


def numbered(count):
    tokens = np.arange(count, dtype=np.int32)[:, None].repeat(2, axis=1)
    return TokenRows(tokens, np.ones_like(tokens, bool))


@settings(max_examples=40)
@given(count=st.integers(1, 9), rows=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_every_pass_takes_every_row_once_in_an_order_of_its_own(count, rows, seed):
    batches = ShuffledBatches(numbered(count), rows, seed)
    steps = -(-4 * count // rows)
    sequence = np.concatenate([batches.rows(step) for step in range(steps)])
    for begin in range(0, 4 * count, count):
        assert sorted(sequence[begin : begin + count]) == list(range(count))
    np.testing.assert_array_equal(ShuffledBatches(numbered(count), rows, seed).rows(steps - 1), sequence[-rows:])
    np.testing.assert_array_equal(batches.batch(0).tokens[:, 0], sequence[:rows])


def test_passes_and_seeds_differ():
    orders = [ShuffledBatches(numbered(50), 50, seed).rows(step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != list(range(50))


def test_a_step_is_described_by_its_first_rows():
    batches = ShuffledBatches(numbered(20), 10, 3)
    first = ", ".join(str(row) for row in batches.rows(5)[:8])
    assert batches.describe(5) == f"rows {first} and 2 more of those that were read, from 0"


def test_a_step_of_rows_with_lines_is_described_by_these():
    twenty = numbered(20)
    batches = ShuffledBatches(TokenRows(twenty.tokens, twenty.loss_mask, 100 + np.arange(20)), 2, 3)
    first, second = batches.rows(5)
    assert batches.describe(5) == f"lines {100 + first}, {100 + second} of the file"
    assert batches.batch(5).lines.tolist() == [100 + first, 100 + second]
    with pytest.raises(InputError, match=r"lines are int64 \[3\]; they must be integers, one to each of 20 rows"):
        TokenRows(twenty.tokens, twenty.loss_mask, np.arange(3))


def test_pack_drops_a_shorter_last_row():
    np.testing.assert_array_equal(pack(np.arange(7), 3).tokens, [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(InputError, match="has 2 tokens, one row takes 3"):
        pack(np.arange(2), 3)


def test_pad_scores_nothing_behind_the_end():
    examples = pad([([4, 5], [False, True]), ([6, 7, 8], [True] * 3)], 4)
    np.testing.assert_array_equal(examples.tokens, [[4, 5, 0, 0], [6, 7, 8, 0]])
    np.testing.assert_array_equal(examples.loss_mask, [[0, 1, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("tokens", "loss_mask", "text"),
    [
        (np.zeros((2, 3)), np.ones((2, 3), bool), "training tokens are float64"),
        (np.zeros((2, 1), int), np.ones((2, 1), bool), "2 tokens or more"),
        (np.zeros((2, 3), int), np.ones((2, 3), int), "loss_mask is int64"),
        (np.zeros((2, 3), int), np.array([[0, 1, 0], [1, 0, 0]], bool), "row 1 has no scored token after its first"),
    ],
)
def test_rows_that_cannot_train_are_refused(tokens, loss_mask, text):
    with pytest.raises(InputError, match=text):
        TokenRows(tokens, loss_mask)
