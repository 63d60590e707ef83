"""Where k-means begins: a spread-out sample with as many codes in each region as the best codebook has there.

Letters: m vectors, n codes, g weights per vector, s vectors sampled. High-resolution quantisation theory (Zador)
says that the best codes lie with density p^(g/(g+2)) where the vectors lie with density p: thinner than the
vectors where these crowd, thicker in the tails. Lloyd's iterations move codes a little at a time, so a start of
uniformly drawn vectors never gets there.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_SAMPLES_PER_CODE = 16
_LEAF = 16
"""Vectors of a leaf: enough to measure how far apart they lie, few enough to lie together."""
_FLOOR = 1e-3
"""Least error of a leaf as a share of the mean: even a crowd of equal vectors may get a code."""


def spread_start(lanes: jax.Array, weights: jax.Array | None, key: jax.Array, num_codes: int) -> jax.Array:
    """Returns codes [n, g], each one of the vectors.

    Args:
      lanes: [g, m] float32, m >= n.
      weights: [m] >= 0 or None; the density that counts is that of the weight.
      key: draws the sample and the codes from it.
    """
    m = lanes.shape[1]
    drawing, picking = jax.random.split(key)
    size = min(m, _SAMPLES_PER_CODE * num_codes)
    stretches = np.arange(size + 1) * m // size
    positions = _one_of_each(drawing, stretches.astype(np.int32))
    mass = jnp.ones(positions.shape, jnp.float32) if weights is None else weights[positions]
    codes: jax.Array = _pick(lanes[:, positions].T, mass, picking, num_codes=num_codes)
    return codes


@jax.jit
def _one_of_each(key: jax.Array, stretches: jax.Array) -> jax.Array:
    """Returns a position [s] from each of the stretches [s+1] between two positions."""
    inside = jax.random.uniform(key, (stretches.shape[0] - 1,)) * jnp.diff(stretches)
    return stretches[:-1] + jnp.floor(inside).astype(jnp.int32)


@partial(jax.jit, static_argnames="num_codes")
def _pick(sample: jax.Array, mass: jax.Array, key: jax.Array, *, num_codes: int) -> jax.Array:
    """Returns n of the sampled vectors [s, g], none twice within rounding, with the density of good codes."""
    size = sample.shape[0]
    # The tree halves evenly: up to a power of two the sample repeats itself, and no repeat is ever picked.
    repeated = jnp.arange(1 << (size - 1).bit_length()) % size
    order = _tree_order(sample[repeated])
    nearby = repeated[order]
    share = _zador_share(sample[nearby], mass[nearby])
    ends = jnp.cumsum(_capped(jnp.where(order < size, share, 0.0), num_codes))
    # Systematic sampling along the tree: neighbours in the order are neighbours in space.
    ticks = (jnp.arange(num_codes) + jax.random.uniform(key)) * (ends[-1] / num_codes)
    return sample[nearby[jnp.searchsorted(ends, ticks, side="right")]]


def _tree_order(vectors: jax.Array) -> jax.Array:
    """Returns an order of the vectors [2^k, g] in which each run of 2^j, j >= 4, is a box of a k-d tree."""
    size, g = vectors.shape
    order = jnp.arange(size)
    while size > _LEAF:
        boxes = vectors[order].reshape(-1, size, g)
        widest = jnp.argmax(jnp.var(boxes, axis=1), axis=1)
        along = jnp.take_along_axis(boxes, widest[:, None, None], axis=2)[..., 0]
        inside = jnp.argsort(along, axis=1)
        order = jnp.take_along_axis(order.reshape(-1, size), inside, axis=1).reshape(-1)
        size //= 2
    return order


def _zador_share(vectors: jax.Array, mass: jax.Array) -> jax.Array:
    """Returns [s] >= 0: the codes that each of the ordered vectors [s, g] is due, up to a factor.

    A leaf of weight w that extends over a length l is due w^(g/(g+2)) * (l^g)^(2/(g+2)) codes, which is the power
    g/(g+2) of w * l^2, its error if it had one code.
    """
    s, g = vectors.shape
    leaf = min(_LEAF, s)
    leaves, mass = vectors.reshape(-1, leaf, g), mass.reshape(-1, leaf, 1)
    total = jnp.sum(mass, axis=1, keepdims=True)
    centre = jnp.sum(mass * leaves, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    error = jnp.sum(mass * jnp.square(leaves - centre), axis=(1, 2))
    mean = jnp.mean(error)
    share = jnp.where(mean > 0, (error / jnp.where(mean > 0, mean, 1.0) + _FLOOR) ** (g / (g + 2)), 1.0)
    return jnp.repeat(share, leaf)


def _capped(share: jax.Array, num_codes: int) -> jax.Array:
    """Returns probabilities [s] <= 1 of sum n, in proportion to `share` wherever that stays below 1."""

    def scale(_: jax.Array, factor: jax.Array) -> jax.Array:
        full = factor * share >= 1.0
        rest = jnp.sum(jnp.where(full, 0.0, share))
        return jnp.where(rest > 0, (num_codes - jnp.sum(full)) / jnp.where(rest > 0, rest, 1.0), factor)

    factor = jax.lax.fori_loop(0, 20, scale, num_codes / jnp.sum(share))
    return jnp.minimum(factor * share, 1.0)
