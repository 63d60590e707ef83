"""Probe lists: for every leaf of a tree of codes, the nearest leaves, in which its vectors search for their code.

Letters: n codes, g weights per code; k leaves of b codes; s leaves on a list.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.kmeans.tree import EMPTY, CodeTree

_CENTRE_SHARE = 0.1
"""Weight of the squared distance between centres in the rank of a leaf: most boxes near a leaf touch its centre, at
a distance of 0."""
_ROWS = 256
"""Lists made at once. Changes the speed only."""


class Lists(NamedTuple):
    """The probe lists of k leaves.

    Attributes:
      centres: float32 [k, g], the mean of each leaf's codes.
      searched: int32 [k, s], the leaves on each list, nearest first.
      reach: float32 [k]. No code outside the list of a leaf is nearer to the leaf's centre than this distance; inf if
        all leaves are listed.
    """

    centres: jax.Array
    searched: jax.Array
    reach: jax.Array


@partial(jax.jit, static_argnames="length")
def make_probe_lists(tree: CodeTree, codebook: jax.Array, *, length: int) -> Lists:
    """Returns lists of `length` leaves, or of all if there are fewer.

    Args:
      tree: of the codes.
      codebook: float32 [n, g], the codes.
      length: s, >= 1.
    """
    k = tree.order.shape[0]
    here = tree.order != EMPTY
    codes = jnp.where(here[..., None], codebook[tree.order], 0.0)
    live = here.any(axis=1)
    centres = jnp.sum(codes, axis=1) / jnp.maximum(jnp.sum(here, axis=1), 1).astype(jnp.float32)[:, None]
    along = jnp.dot(codes, tree.directions, precision="highest")
    low = jnp.min(jnp.where(here[..., None], along, jnp.inf), axis=1)
    high = jnp.max(jnp.where(here[..., None], along, -jnp.inf), axis=1)
    middle = jnp.dot(centres, tree.directions, precision="highest")
    some_rows = partial(_nearest_boxes, low=low, high=high, middle=middle, live=live, length=min(length, k))
    rows = min(_ROWS, k)
    searched, reach = jax.lax.map(some_rows, middle.reshape(k // rows, rows, -1))
    return Lists(centres, searched.reshape(k, -1), reach.reshape(k))


def _nearest_boxes(
    points: jax.Array, *, low: jax.Array, high: jax.Array, middle: jax.Array, live: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (boxes [r, length], distance [r] from the nearest of the others) to points [r, d], among boxes [k, d]."""
    gap = jnp.zeros((points.shape[0], low.shape[0]), jnp.float32)
    apart = jnp.zeros_like(gap)
    for t in range(points.shape[1]):
        x = points[:, t, None]
        gap += jnp.square(jnp.maximum(jnp.maximum(low[:, t] - x, x - high[:, t]), 0.0))
        apart += jnp.square(middle[:, t] - x)
    gap = jnp.where(live, gap, jnp.inf)
    rank = gap + _CENTRE_SHARE * apart
    # The barrier keeps XLA's fast top_k; where its results are sliced, XLA would sort every row in full.
    best, boxes = jax.lax.optimization_barrier(jax.lax.top_k(-rank, length))  # type: ignore[no-untyped-call]
    beyond = jnp.where(-rank < best[:, -1:], gap, jnp.inf)
    return boxes, jnp.sqrt(jnp.min(beyond, axis=1))
