"""Continuations are samples of the model's own distribution, against its logits in float64."""

from typing import Any

import jax
import numpy as np
import pytest
from small_runs import CONFIG

from cluscomp_jax import llama
from cluscomp_jax.inference.continuations import continue_rows, prompt_length
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.source import as_source
from cluscomp_jax.runtime.reporter import SilentReporter

ROWS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (5, 24))


@pytest.fixture(scope="module")
def params() -> Any:
    return llama.init_params(CONFIG, jax.random.key(1))


def written(params: Any, count: int, seed: int = 0) -> np.ndarray:
    model = build_model(CONFIG)
    options: dict[str, Any] = {"seed": seed, "dtype": "float32", "reporter": SilentReporter()}
    return continue_rows(as_source(params, model), model, ROWS, count, **options)


def test_rows_begin_as_they_are_told_and_are_likely_as_often_as_the_model_says(params: Any) -> None:
    rows = written(params, 70)
    assert rows.shape == (70, 24)
    np.testing.assert_array_equal(rows[:, :12], ROWS[np.arange(70) % 5, :12])
    logits = np.asarray(llama.forward(params, rows, CONFIG), np.float64)[:, 11:-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    surprise = -np.take_along_axis(log_p, rows[:, 12:, None], axis=2)[..., 0]
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    variance = (np.exp(log_p) * (log_p + entropy[..., None]) ** 2).sum(-1)
    # The difference has mean 0 given the tokens before, so that variances add; five deviations.
    assert abs((surprise - entropy).sum()) < 5 * np.sqrt(variance.sum())


def test_a_seed_gives_the_same_rows_and_repeated_beginnings_part(params: Any) -> None:
    rows = written(params, 40)
    np.testing.assert_array_equal(rows[:33], written(params, 40)[:33])
    assert not np.array_equal(rows, written(params, 40, seed=1))
    assert len(np.unique(rows, axis=0)) == 40


@pytest.mark.parametrize(("length", "expected"), [(2, 1), (3, 1), (24, 12), (64, 32), (512, 32)])
def test_the_beginning_of_a_row(length: int, expected: int) -> None:
    assert prompt_length(length) == expected
