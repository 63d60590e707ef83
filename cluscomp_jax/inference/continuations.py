"""Text that a model writes itself: it continues the beginnings of given rows."""

import numpy as np
from jax import random

from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.source import ParamSource
from cluscomp_jax.runtime.reporter import Reporter

_TOGETHER = 32
"""Rows that are written together, at most."""
SAMPLING = Sampling(temperature=1.0)
"""The model's own distribution."""
_PROMPT = 32


def continue_rows(
    source: ParamSource, model: Model, rows: np.ndarray, count: int, *, seed: int, dtype: str, reporter: Reporter
) -> np.ndarray:
    """Returns int32 [count, t]: row i begins as row i modulo n of `rows` does, and the model wrote the rest.

    Rows that have one beginning differ from there on. The whole model is held on the device meanwhile.

    Args:
      source: the model's parameters.
      model: what computes with them.
      rows: tokens int [n, t], t >= 2, of which the first `prompt_length(t)` are read.
      count: >= 1.
      seed: of the draws; the same seed gives the same rows.
      dtype: compute dtype.
      reporter: of progress.
    """
    length = rows.shape[1]
    prompt, (batch, batches) = prompt_length(length), batches_of(count)
    reporter.start("recover: the original writes", batches * batch * (length - prompt), "tokens")
    decoder = Decoder.load(source, model, dtype=dtype, decode_weights="once")
    written = []
    for turn in range(batches):
        # The last batch is as large as the others, so that one program serves all.
        beginnings = rows[(turn * batch + np.arange(batch)) % len(rows), :prompt].astype(np.int32)
        columns = [beginnings]
        for tokens in decoder.stream(
            list(beginnings), length - prompt, SAMPLING, random.fold_in(random.key(seed), turn)
        ):
            columns.append(np.asarray(tokens)[:, None])
            reporter.advance(batch)
        written.append(np.concatenate(columns, axis=1))
    return np.concatenate(written)[:count]


def batches_of(count: int) -> tuple[int, int]:
    """Returns (rows of a batch, batches) in which `count` >= 1 rows are written, and some to spare in the last one."""
    batch = min(count, _TOGETHER)
    return batch, -(-count // batch)


def prompt_length(length: int) -> int:
    """Returns how many tokens of a row of `length` >= 2 are its beginning: 32, or half of a short one."""
    return min(_PROMPT, length // 2)
