"""Lloyd's k-means over weighted vectors: a host function of checks and clocks over jitted pieces."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.kmeans.assign import nearest_lanes
from cluscomp_jax.kmeans.start import spread_start

_MAX_CODES = 65536
_MAX_GROUP = 32


@dataclasses.dataclass(frozen=True)
class KMeansStats:
    """What a fit did.

    Attributes:
      inertia: sum of weight times squared distance, float; before each update, and last for what is returned.
      refills: empty clusters given a new code, over all iterations.
      seconds: wall time, compilation included.
    """

    inertia: tuple[float, ...]
    refills: int
    seconds: float


def fit_codebook(
    vectors: jax.Array | np.ndarray,
    *,
    num_codes: int,
    key: jax.Array,
    weights: jax.Array | np.ndarray | None = None,
    iterations: int = 20,
) -> tuple[jax.Array, jax.Array, KMeansStats]:
    """Returns (codebook float32 [n, g], index int32 [m], stats) of k-means on `vectors`.

    One start from vectors drawn where codes are due (`spread_start`), exact Lloyd iterations (paper section 3.2),
    then one exact assignment: `index` is the nearest of the returned codes. A cluster that falls empty takes a
    vector whose weighted error is among the largest. With at most `num_codes` distinct vectors the result is exact.

    Args:
      vectors: [m, g], m >= 1, 1 <= g <= 32, any floating dtype; computed in float32.
      num_codes: n, 1 to 65536.
      key: decides the start; same key, same bytes.
      weights: [m], finite, >= 0, or None for all equal.
      iterations: Lloyd iterations, >= 0.

    Raises:
      InputError: a size out of range, a weight that is negative, or a value that is not finite.
    """
    began = time.monotonic()
    _check(vectors, num_codes, weights, iterations)
    lanes = jnp.asarray(vectors).astype(jnp.float32).T
    if weights is not None:
        weights = jnp.asarray(weights).astype(jnp.float32)
    _check_finite(lanes, weights)
    exact = _exact_codebook(lanes, num_codes, key)
    if exact is not None:
        codebook, index = exact
        return codebook, index, KMeansStats((0.0,), 0, time.monotonic() - began)
    codebook = spread_start(lanes, weights, key, num_codes)
    inertias, refills = [], []
    for _ in range(iterations):
        codebook, inertia, refilled = _lloyd(lanes, weights, codebook)
        inertias.append(inertia)
        refills.append(refilled)
    index, inertia = _finish(lanes, weights, codebook)
    inertias.append(inertia)
    values = tuple(float(value) for value in jax.device_get(inertias))
    return codebook, index, KMeansStats(values, int(sum(jax.device_get(refills))), time.monotonic() - began)


def _check(
    vectors: jax.Array | np.ndarray, num_codes: int, weights: jax.Array | np.ndarray | None, iterations: int
) -> None:
    if vectors.ndim != 2 or vectors.shape[0] < 1:
        raise InputError(f"vectors have shape {tuple(vectors.shape)}; k-means takes [m, g] with m >= 1")
    m, g = vectors.shape
    if not 1 <= g <= _MAX_GROUP:
        raise InputError(f"vectors have {g} components; k-means takes 1 to {_MAX_GROUP}")
    if not 1 <= num_codes <= _MAX_CODES:
        raise InputError(f"num_codes is {num_codes}; it must be 1 to {_MAX_CODES}")
    if iterations < 0:
        raise InputError(f"iterations is {iterations}; it must be 0 or more")
    if weights is not None and weights.shape != (m,):
        raise InputError(f"weights have shape {tuple(weights.shape)}; {m} vectors need ({m},)")


def _check_finite(lanes: jax.Array, weights: jax.Array | None) -> None:
    if not bool(jnp.isfinite(lanes).all()):
        t, i = np.argwhere(~np.isfinite(np.asarray(lanes)))[0]
        raise InputError(f"vectors[{i}, {t}] is {float(lanes[t, i])}; k-means takes finite numbers")
    if weights is not None and not bool((jnp.isfinite(weights) & (weights >= 0)).all()):
        (i,) = np.argwhere(~(np.isfinite(np.asarray(weights)) & (np.asarray(weights) >= 0)))[0]
        raise InputError(f"weights[{i}] is {float(weights[i])}; weights must be finite and 0 or more")


def _exact_codebook(lanes: jax.Array, num_codes: int, key: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """Returns (codebook, index) that repeat every vector exactly, or None if there are too many distinct ones."""
    host = np.ascontiguousarray(np.asarray(lanes).T) + 0.0  # -0.0 and 0.0 are one vector
    m, g = host.shape
    if m > num_codes:
        # More than n distinct vectors in a sample settle the question without sorting them all.
        sample = np.asarray(jax.random.randint(key, (min(m, 4 * num_codes),), 0, m))
        if len(_distinct(host[sample])[0]) > num_codes:
            return None
    values, index = _distinct(host)
    if len(values) > num_codes:
        return None
    codebook = np.zeros((num_codes, g), np.float32)
    codebook[: len(values)] = values
    return jnp.asarray(codebook), jnp.asarray(index.astype(np.int32))


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first], inverse


@jax.jit
def _lloyd(lanes: jax.Array, weights: jax.Array | None, codebook: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One iteration: returns (next codebook, inertia of the given one, clusters refilled)."""
    g, m = lanes.shape
    n = codebook.shape[0]
    index, distance = nearest_lanes(lanes, codebook)
    error = distance if weights is None else distance * weights
    mass = jnp.ones((m,), jnp.float32) if weights is None else weights
    # Offsets from the present code are small beside the code: their float32 sums keep more digits.
    offsets = (lanes - codebook.T[:, index]) * mass
    sums = jnp.zeros((n, g), jnp.float32).at[index].add(offsets.T, mode="promise_in_bounds")
    masses = jnp.zeros((n,), jnp.float32).at[index].add(mass, mode="promise_in_bounds")
    moved = codebook + sums / jnp.where(masses > 0, masses, 1.0)[:, None]
    empty = masses <= 0
    refilled = jnp.sum(empty)
    moved = jax.lax.cond(refilled > 0, _refill, lambda codes, *_: codes, moved, empty, error, lanes)
    return moved, jnp.sum(error), refilled


def _refill(codebook: jax.Array, empty: jax.Array, error: jax.Array, lanes: jax.Array) -> jax.Array:
    """Puts the empty codes, in order, onto the vectors of largest error; those without error stay where they are."""
    worst_error, worst = jax.lax.top_k(error, min(codebook.shape[0], error.shape[0]))
    rank = jnp.clip(jnp.cumsum(empty) - 1, 0, worst.shape[0] - 1)
    taken = empty & (worst_error[rank] > 0)
    return jnp.where(taken[:, None], lanes[:, worst[rank]].T, codebook)


@jax.jit
def _finish(lanes: jax.Array, weights: jax.Array | None, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    index, distance = nearest_lanes(lanes, codebook)
    return index, jnp.sum(distance if weights is None else distance * weights)
