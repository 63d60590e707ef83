"""k-means over weighted vectors: a host function that checks, times and calls jitted steps."""

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core.caller_mesh import on_one_device, without_mesh
from cluscomp_jax.errors import InputError
from cluscomp_jax.kmeans.assignment import Assignment, Blocks, next_codebook
from cluscomp_jax.kmeans.init import draw_sample, init_codebook
from cluscomp_jax.kmeans.probe_lists import make_probe_lists
from cluscomp_jax.kmeans.search import search_all, search_listed
from cluscomp_jax.kmeans.tree import grow_tree, leaves_of, random_rotation

_MAX_CODES = 65536
_MAX_GROUP = 32
_BLOCK = 262144
_UNIT = 4096
"""`_BLOCK` is the largest number of vectors that are sorted and summed together, `_UNIT` what the number is a multiple
of."""
_GPU_BLOCK = 2**20
"""`_BLOCK` on a GPU: every block is a dozen launches. Leaf and place of a vector still are one number of 32 bits."""
COMPARE_ALL, GPU_COMPARE_ALL = 256, 4096
"""Up to this many codes every vector is compared with all of them; on a GPU one kernel does it."""
SETTLING = 4
"""The lists of the last assignment are this many times as long."""
_STEP, _MOMENTUM = 1.5, 0.7
_PLAIN_UPDATES = 3
"""The last updates are plain means, without momentum, so that the codes converge."""


@dataclasses.dataclass(frozen=True)
class KMeansStats:
    """What a fit did.

    Attributes:
      inertia: sum of weight times squared distance, float; before each update, and last for what is returned.
      certified: share of the vectors, 0 to 1, of which it is proven that no code is nearer than the one returned.
      reseeded: codes without vectors that were moved onto a vector, over all iterations.
      seconds: wall time, compilation included.
    """

    inertia: tuple[float, ...]
    certified: float
    reseeded: int
    seconds: float


def fit_codebook(
    vectors: jax.Array | np.ndarray,
    *,
    num_codes: int,
    key: jax.Array,
    weights: jax.Array | np.ndarray | None = None,
    iterations: int = 20,
    accelerate: bool = True,
) -> tuple[jax.Array, jax.Array, KMeansStats]:
    """Returns (codebook float32 [n, g], index int32 [m], stats) of k-means on `vectors` (paper section 3.2).

    The initial codes are vectors drawn with the density of good codes (`init_codebook`). Then `iterations` times all
    vectors are assigned and the codebook is updated.
    Up to 256 codes every assignment is exact. With more, a vector keeps the code it has unless it finds a nearer one
    on the lists of a tree, and every iteration grows another tree: almost every `index` ends at the nearest code.
    A code without vectors moves onto one of those with the largest weighted error. With at most `num_codes` distinct
    vectors the result is exact.

    Args:
      vectors: [m, g], m >= 1, 1 <= g <= 32, any floating dtype; computed in float32.
      num_codes: n, 1 to 65536.
      key: seed of the initial codes and the trees; same key, same bytes.
      weights: [m], finite, >= 0, or None for all equal.
      iterations: updates of the codebook, >= 0.
      accelerate: all updates but the last three overshoot and keep a share of their velocity, which reaches in half
        the iterations what Lloyd's own updates (False) reach.

    Raises:
      InputError: a size out of range, a weight that is negative, or a value that is not finite.
    """
    began = time.monotonic()
    with without_mesh():
        _check(vectors, num_codes, weights, iterations)
        m = vectors.shape[0]
        vectors, weights = on_one_device(vectors), on_one_device(weights)
        gpu = on_gpu(vectors)
        blocks = make_blocks(vectors, weights, gpu=gpu)
        del vectors, weights  # where the caller has no reference either, their memory is free from here on
        _check_finite(blocks)
        sample, mass = draw_sample(blocks, key, num_codes=num_codes, count=m)
        exact = _exact_codebook(blocks, m, num_codes, sample)
        if exact is not None:
            codebook, index = exact
            return codebook, index, KMeansStats((0.0,), 1.0, 0, time.monotonic() - began)
        codebook = init_codebook(sample, mass, key, num_codes=num_codes)
        velocity = jnp.zeros_like(codebook)
        previous = jnp.full(blocks.weights.shape, -1, jnp.int32)
        inertia, reseeded = [], []
        for i in range(iterations):
            assignment = _search(blocks, previous, codebook, key, i, gpu=gpu)
            step, momentum = (_STEP, _MOMENTUM) if accelerate and i < iterations - _PLAIN_UPDATES else (1.0, 0.0)
            codebook, velocity, refilled = next_codebook(blocks, codebook, velocity, assignment, step, momentum)
            previous = assignment.nearest
            inertia.append(assignment.inertia)
            reseeded.append(refilled)
        assignment = _search(blocks, previous, codebook, key, iterations, gpu=gpu, longer=SETTLING)
        values = jax.device_get(([*inertia, assignment.inertia], _share(assignment.certain, m), reseeded))
        stats = KMeansStats(
            tuple(float(value) for value in values[0]), float(values[1]), int(sum(values[2])), time.monotonic() - began
        )
        return codebook, in_order(assignment.nearest, m), stats


def fit_codebooks(
    vectors: jax.Array | np.ndarray,
    *,
    num_codes: int,
    keys: jax.Array,
    weights: jax.Array | np.ndarray | None = None,
    iterations: int = 20,
    accelerate: bool = True,
) -> tuple[jax.Array, jax.Array, list[KMeansStats]]:
    """Returns (codebooks [k, n, g], index int32 [k, m], stats) of k matrices of one shape, each as `fit_codebook` does.

    The matrices follow each other through the same compiled programs: the memory is that of one.

    Args:
      vectors: [k, m, g], k >= 1, any floating dtype.
      num_codes: n, 1 to 65536.
      keys: [k], one key for each.
      weights: [k, m], finite, >= 0, or None for all equal.
      iterations: updates of each codebook, >= 0.
      accelerate: as in `fit_codebook`.

    Raises:
      InputError: as `fit_codebook`, or the leading sizes differ.
    """
    if vectors.ndim != 3 or len(vectors) < 1:
        raise InputError(f"vectors have shape {tuple(vectors.shape)}; a batch is [k, m, g] with k >= 1")
    if keys.shape[:1] != (len(vectors),) or (weights is not None and len(weights) != len(vectors)):
        given = "" if weights is None else f" and {len(weights)} rows of weights"
        raise InputError(f"{len(vectors)} matrices came with keys of shape {keys.shape}{given}; each needs its own")
    fits = [
        fit_codebook(
            vectors[i],
            num_codes=num_codes,
            key=keys[i],
            weights=None if weights is None else weights[i],
            iterations=iterations,
            accelerate=accelerate,
        )
        for i in range(len(vectors))
    ]
    return jnp.stack([fit[0] for fit in fits]), jnp.stack([fit[1] for fit in fits]), [fit[2] for fit in fits]


def _search(
    blocks: Blocks, previous: jax.Array, codebook: jax.Array, key: jax.Array, turn: int, *, gpu: bool, longer: int = 1
) -> Assignment:
    n, g = codebook.shape
    if compares_all(n, gpu=gpu):
        assignment: Assignment = search_all(blocks, codebook)
        return assignment
    tree = grow_tree(codebook, random_rotation(key, turn + 1, g=g))
    probe_lists = make_probe_lists(tree, codebook, length=longer * codes_searched(g) // leaves_of(n)[1])
    assignment = search_listed(blocks, previous, codebook, tree, probe_lists)
    return assignment


def compares_all(num_codes: int, *, gpu: bool) -> bool:
    """Returns whether every vector is compared with all codes."""
    return num_codes <= (GPU_COMPARE_ALL if gpu else COMPARE_ALL)


def on_gpu(array: Any) -> bool:
    """Returns whether programs of an array, of the host or a shape too, run on a GPU."""
    place = getattr(array, "sharding", None)
    platforms = {jax.default_backend()} if place is None else {device.platform for device in place.device_set}
    return platforms <= {"gpu", "cuda"}


@partial(jax.jit, static_argnames="m")
def _share(certain: jax.Array, m: int) -> jax.Array:
    return jnp.mean(certain.reshape(-1)[:m])


@partial(jax.jit, static_argnames="m")
def in_order(nearest: jax.Array, m: int) -> jax.Array:
    """Returns int32 [m], the codes of the first m vectors of blocks.

    Args:
      nearest: int32 [k, m'], by block.
      m: number of vectors without padding.
    """
    return nearest.reshape(-1)[:m]


def codes_searched(g: int) -> int:
    """Returns how many codes a vector of g weights is compared with; a code has more neighbours at larger g."""
    return 128 if g <= 4 else 256 if g <= 6 else 512


@partial(jax.jit, static_argnames="gpu")
def make_blocks(vectors: jax.Array, weights: jax.Array | None, *, gpu: bool = False) -> Blocks:
    """Returns the vectors in equal blocks, as few as possible, in float32.

    Args:
      vectors: [m, g], floating, m >= 1.
      weights: [m], floating, >= 0. None: 1 for each.
      gpu: whether the blocks are those of a GPU, which are larger.
    """
    m, g = vectors.shape
    count = -(-m // (_GPU_BLOCK if gpu else _BLOCK))
    block = -(-m // (count * _UNIT)) * _UNIT
    spare = count * block - m
    vectors = vectors.astype(jnp.float32)
    vectors = jnp.concatenate([vectors, jnp.broadcast_to(vectors[:1], (spare, g))])
    weights = jnp.ones((m,), jnp.float32) if weights is None else weights.astype(jnp.float32)
    return Blocks(vectors.reshape(count, block, g), jnp.pad(weights, (0, spare)).reshape(count, block))


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


def _check_finite(blocks: Blocks) -> None:
    vectors_fine, weights_fine = jax.device_get(is_finite(blocks))
    if not vectors_fine:
        vectors = np.asarray(blocks.vectors).reshape(-1, blocks.vectors.shape[-1])
        i, t = np.argwhere(~np.isfinite(vectors))[0]
        raise InputError(f"vectors[{i}, {t}] is {float(vectors[i, t])}; k-means takes finite numbers")
    if not weights_fine:
        weights = np.asarray(blocks.weights).reshape(-1)
        (i,) = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))[0]
        raise InputError(f"weights[{i}] is {float(weights[i])}; weights must be finite and 0 or more")


@jax.jit
def is_finite(blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Returns (whether all vectors are finite, whether all weights are finite and >= 0), bool scalars.

    Args:
      blocks: float32 vectors [k, m', g] and weights [k, m'].
    """
    weights = blocks.weights
    return jnp.isfinite(blocks.vectors).all(), (jnp.isfinite(weights) & (weights >= 0)).all()


def _exact_codebook(blocks: Blocks, m: int, num_codes: int, sample: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """Returns (codebook, index) that repeat every vector exactly, or None if there are too many distinct ones."""
    g = blocks.vectors.shape[-1]
    if m > num_codes:
        # More than n distinct ones among a few vectors settle the question without sorting them all.
        few = np.asarray(sample)[:: max(1, len(sample) // (2 * num_codes + 64))]
        if len(np.unique(_fingerprints(few))) > num_codes:
            return None
    values, index = _distinct(np.asarray(blocks.vectors).reshape(-1, g)[:m])
    if len(values) > num_codes:
        return None
    codebook = np.zeros((num_codes, g), np.float32)
    codebook[: len(values)] = values
    return jnp.asarray(codebook), jnp.asarray(index.astype(np.int32))


def _fingerprints(rows: np.ndarray) -> np.ndarray:
    """Returns uint64 [m], equal for equal rows [m, g]; for different ones almost never."""
    words = (rows + 0.0).view(np.uint32).astype(np.uint64)  # -0.0 and 0.0 are one number
    mixed = np.zeros(len(rows), np.uint64)
    for t in range(rows.shape[1]):
        mixed = (mixed ^ words[:, t]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct rows and, for each row, which of them it is."""
    rows = np.ascontiguousarray(rows) + 0.0
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first], inverse
