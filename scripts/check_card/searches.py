"""The kernels that search codes: their values against float64 NumPy, and their times; launches a second before them."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from check_card.step import Step
from cluscomp_jax.clustering.code_search import NearestCodes, NearestPath
from cluscomp_jax.clustering.walk import Rows
from cluscomp_jax.kmeans import assign
from cluscomp_jax.trellis.viterbi import Trellis
from pallas_kernels.implementation import IMPLEMENTATION

_TOLERANCE = 1e-5
"""Of a squared distance in float32, relative."""


def run_searches(step: Step) -> None:
    """Measures launches, then a walk of all codes, one of trees, one of paths, and the nearest of all codes."""
    turns = 10 if step.dry else 5000
    _, took = _warm(jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, x: jnp.sort(-x), x)), jnp.ones(64))
    step.fact("launches", loop_turns=turns, seconds_a_turn=took / turns)
    rows, outputs = (5, 24) if step.dry else (128, 8192)
    all_codes, many, window = (16, 2200, 4) if step.dry else (4096, 65500, 12)
    with IMPLEMENTATION("interpret" if step.dry else None):
        _walk(step, "walk, all codes", NearestCodes(), rows, outputs, 2 if step.dry else 4, all_codes)
        _walk(step, "walk, trees", NearestCodes(), rows, outputs, 2 if step.dry else 4, many)
        _walk(step, "walk, paths", NearestPath(Trellis(window, 2)), rows, outputs, 2, 1 << window)
        _nearest(step, *((40, 8) if step.dry else (2**20, 4096)))


def _warm(call: Any, *arguments: Any) -> tuple[Any, float]:
    """Returns (what a call gives, its seconds once it is compiled)."""
    jax.block_until_ready(call(*arguments))  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    found = jax.block_until_ready(call(*arguments))  # type: ignore[no-untyped-call]
    return found, time.perf_counter() - began


def _walk(step: Step, name: str, search: Any, r: int, o: int, g: int, n: int) -> None:
    """Walks a block; each code must be as near to its target as its search promises."""
    rng = np.random.default_rng(0)
    base, value = rng.standard_normal((2, r, o)).astype(np.float32)
    weights = np.triu(rng.standard_normal((r, r)) / r, 1).astype(np.float32)
    codebook = jnp.asarray(rng.standard_normal((n, g)), jnp.float32)
    search = search.for_codebook(codebook, jax.random.key(0))
    rows = Rows(*map(jnp.asarray, (base, value, weights)), None)
    interpret = IMPLEMENTATION.value == "interpret"
    walk = jax.jit(lambda rows, codebook: search.walk(rows, codebook, outputs=o, interpret=interpret))
    (codes, delta), took = _warm(walk, rows, codebook)
    table, codes, delta = (np.asarray(array) for array in (codebook, codes, delta))
    exact = bool(np.allclose(delta, value - table[codes].reshape(r, o), atol=1e-6))
    target = base.astype(np.float64) + weights.astype(np.float64) @ delta
    chosen = np.sum((target.reshape(r, -1, g) - table[codes]) ** 2, axis=2)
    if isinstance(search, NearestPath):
        shared = (1 << search.trellis.window_bits - search.trellis.step_bits) - 1
        right = bool(np.all(codes[:, :-1] >> search.trellis.step_bits == codes[:, 1:] & shared))
        ratio = None
    else:
        some, vectors = slice(None, None, max(1, r // 4)), slice(0, 64)  # a few channels
        distances = np.stack([_least(row, table) for row in target.reshape(r, -1, g)[some, vectors]])
        ratio = float(chosen[some, vectors].sum() / distances.sum())
        right = ratio <= (1.05 if search.code_index is not None else 1 + _TOLERANCE)
    sizes = {"channels": r, "outputs": o, "g": g, "codes": n}
    step.fact(name, right=exact and right, seconds=took, distance_over_least=ratio, error=chosen.mean(), **sizes)


def _least(vectors: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the least squared distance of every vector from a table, float64."""
    found: np.ndarray = np.min(np.sum((vectors[:, None] - table.astype(np.float64)) ** 2, axis=2), axis=1)
    return found


def _nearest(step: Step, m: int, n: int) -> None:
    """Finds the nearest of all codes."""
    rng = np.random.default_rng(1)
    vectors, table = rng.standard_normal((m, 4)).astype(np.float32), rng.standard_normal((n, 4)).astype(np.float32)
    call = functools.partial(jax.jit(lambda vectors, table: assign(vectors, table)))
    (_, distance), took = _warm(call, jnp.asarray(vectors), jnp.asarray(table))
    expected = _least(vectors[:256].astype(np.float64), table)
    right = bool(np.allclose(np.asarray(distance)[:256], expected, rtol=_TOLERANCE, atol=1e-7))
    step.fact("nearest of all codes", right=right, seconds=took, pairs_per_second=m * n / took, vectors=m, codes=n)
