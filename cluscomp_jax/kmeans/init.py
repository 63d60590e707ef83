"""The initial codebook of k-means: sampled vectors, as many in each region as the best codebook has codes there.

Letters: m vectors, n codes, g weights per vector, s vectors sampled. High-resolution quantisation theory (Zador)
says that the best codes have density p^(g/(g+2)) where the vectors have density p: fewer than the vectors where these
are dense, more in the tails. Lloyd's iterations move codes a little at a time, so that from uniformly drawn vectors
they never reach that density.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.kmeans.assignment import Blocks
from cluscomp_jax.kmeans.tree import random_rotation

_SAMPLES_PER_CODE = 16
_PER_LEAF = 16
"""Vectors of a leaf: enough to measure their spread, few enough to be close together."""
_FLOOR = 0.01
"""Least error of a vector as a share of the mean: even many equal vectors get a code."""


def init_codebook(sample: jax.Array, mass: jax.Array, key: jax.Array, *, num_codes: int) -> jax.Array:
    """Returns codes float32 [n, g], each one of the sampled vectors, drawn by the density of their weights.

    Args:
      sample: float32 [s, g], s >= n; 16 vectors per code are enough.
      mass: float32 [s], >= 0, their weights.
      key: seed of the tree and the codes.
      num_codes: n.
    """
    rotation = random_rotation(key, 0, g=sample.shape[1])
    codes: jax.Array = pick(sample, mass, rotation, jax.random.fold_in(key, 1), num_codes=num_codes)
    return codes


@partial(jax.jit, static_argnames=("num_codes", "count"))
def draw_sample(blocks: Blocks, key: jax.Array, *, num_codes: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns (vectors float32 [s, g], weights float32 [s]), one from each of s equal parts of `count` vectors.

    Args:
      blocks: the vectors and weights.
      key: seed of the draw.
      num_codes: n; s is 16 n, or `count` if that is less.
      count: number of vectors without padding.
    """
    size = min(count, _SAMPLES_PER_CODE * num_codes)
    stretches = np.arange(size + 1) * count // size
    inside = jax.random.uniform(key, (size,), jnp.float32) * np.diff(stretches).astype(np.float32)
    at = stretches[:-1].astype(np.int32) + jnp.floor(inside).astype(jnp.int32)
    return blocks.vectors.reshape(-1, blocks.vectors.shape[-1])[at], blocks.weights.reshape(-1)[at]


@partial(jax.jit, static_argnames="num_codes")
def pick(sample: jax.Array, mass: jax.Array, rotation: jax.Array, key: jax.Array, *, num_codes: int) -> jax.Array:
    """Returns float32 [n, g], n of the sampled vectors, none twice within rounding, with the density of good codes.

    Args:
      sample: float32 [s, g].
      mass: float32 [s], >= 0, their weights.
      rotation: float32 [g, g], orthogonal, its columns the directions along which the tree cuts.
      key: seed of the draw.
      num_codes: n <= s.
    """
    leaf = _leaves_by_means(sample, rotation)
    leaf, order = jax.lax.sort((leaf, jnp.arange(len(leaf), dtype=jnp.int32)), num_keys=1)
    ends = jnp.cumsum(_capped(_zador_share(sample[order], mass[order], leaf), num_codes))
    # Systematic sampling in the order of the tree, in which neighbours are neighbours in space.
    ticks = (jnp.arange(num_codes, dtype=jnp.float32) + jax.random.uniform(key, dtype=jnp.float32)) * (
        ends[-1] / num_codes
    )
    place = jnp.searchsorted(ends, ticks, side="right")
    codes: jax.Array = sample[order[jnp.minimum(place, len(order) - 1)]]
    return codes


def _leaves_by_means(vectors: jax.Array, rotation: jax.Array) -> jax.Array:
    """Returns the leaf, int32 [s], of each vector [s, g] in a tree that cuts every box at the mean of one direction.

    Means take sums and no sorting, and follow the tails better than medians do.
    """
    s, g = vectors.shape
    depth = max(s // _PER_LEAF, 1).bit_length() - 1
    along = jnp.dot(vectors, rotation, precision="highest").T

    def halve(level: jax.Array, box: jax.Array) -> jax.Array:
        coordinate = jax.lax.dynamic_index_in_dim(along, level % g, keepdims=False)
        members = _sum_by(box, jnp.ones((s,), jnp.float32), 1 << depth)
        mean = _sum_by(box, coordinate, 1 << depth) / jnp.maximum(members, 1.0)
        return 2 * box + jnp.asarray(coordinate > mean[box], jnp.int32)

    leaf: jax.Array = jax.lax.fori_loop(0, depth, halve, jnp.zeros((s,), jnp.int32))
    return leaf


def _zador_share(vectors: jax.Array, mass: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns [s] >= 0: the expected number of codes of each of the vectors [s, g], up to a factor; leaf is sorted.

    A leaf of weight w that extends over a length l gets w^(g/(g+2)) * (l^g)^(2/(g+2)) codes, which is the power
    g/(g+2) of w * l^2, its error if it had one code.
    """
    s, g = vectors.shape
    members = _sum_by(leaf, jnp.ones((s,), jnp.float32), s)
    total = _sum_by(leaf, mass, s)[:, None]
    centre = _sum_by(leaf, mass[:, None] * vectors, s) / jnp.where(total > 0, total, 1.0)
    error = _sum_by(leaf, mass * jnp.sum(jnp.square(vectors - centre[leaf]), axis=1), s)
    # Vectors are nearer to their own mean than to that of all, by the factor (members - 1) / members.
    error *= members / jnp.maximum(members - 1.0, 1.0)
    mean = jnp.sum(error) / s
    share = jnp.where(mean > 0, (error / jnp.where(mean > 0, mean, 1.0) + _FLOOR * members) ** (g / (g + 2)), 1.0)
    return (share / jnp.maximum(members, 1.0))[leaf]


def _sum_by(group: jax.Array, values: jax.Array, groups: int) -> jax.Array:
    return jnp.zeros((groups, *values.shape[1:]), values.dtype).at[group].add(values, mode="promise_in_bounds")


def _capped(share: jax.Array, num_codes: int) -> jax.Array:
    """Returns probabilities [s] <= 1 of sum n, in proportion to `share` wherever that stays below 1."""

    def scale(_: jax.Array, factor: jax.Array) -> jax.Array:
        full = factor * share >= 1.0
        below = jnp.sum(jnp.where(full, 0.0, share))
        left = (num_codes - jnp.sum(full)).astype(jnp.float32)
        return jnp.where(below > 0, left / jnp.where(below > 0, below, 1.0), factor)

    factor = jax.lax.fori_loop(0, 20, scale, num_codes / jnp.sum(share))
    return jnp.minimum(factor * share, 1.0)
