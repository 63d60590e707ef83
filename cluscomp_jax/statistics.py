"""Input moments of a block's kernels, taken through the block's tap. Knows a Model and batches, no files."""

from collections.abc import Callable, Hashable, Iterable
from functools import partial

import jax
import jax.numpy as jnp

from cluscomp_jax.model import Model
from cluscomp_jax.trees import Params

Moment = Callable[[jax.Array], jax.Array]
"""Rows float32 [m, d_in] to the sum over them of what is wanted."""


def channel_moments(model: Model, kind: Hashable, block: Params, batches: Iterable[jax.Array]) -> dict[str, jax.Array]:
    """Returns {block-relative kernel path: E[x_i^2] float32 [d_in]} over all positions of all batches.

    Args:
      block: dense parameters of the block, block-relative paths.
      batches: inputs [b, t, d] of the block, the stream whose moments are wanted.
    """
    means = _site_means(model, kind, block, batches, _squares)
    return {path: means[site] for site, paths in model.sites.items() for path in paths}


def second_moments(model: Model, kind: Hashable, block: Params, batches: Iterable[jax.Array]) -> dict[str, jax.Array]:
    """Returns {site: E[x x^T] float32 [d_in, d_in]} over all positions of all batches; arguments as above.

    Kernels of one site read the same input and share its moments.
    """
    return _site_means(model, kind, block, batches, _products)


def _squares(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows), axis=0)


def _products(rows: jax.Array) -> jax.Array:
    return jnp.dot(rows.T, rows, precision="highest")


def _site_means(
    model: Model, kind: Hashable, block: Params, batches: Iterable[jax.Array], moment: Moment
) -> dict[str, jax.Array]:
    """Returns {site: moment of its inputs, summed over the rows of all batches and divided by their number}."""
    sums: dict[str, jax.Array] | None = None
    positions = 0
    for x in batches:
        sums = _add_batch(model, kind, block, x, sums, moment=moment)
        positions += x.shape[0] * x.shape[1]
    if sums is None:
        raise ValueError("no batches to take the moments of")
    return {site: total / positions for site, total in sums.items()}


@partial(jax.jit, static_argnames=("model", "kind", "moment"), donate_argnames="sums")
def _add_batch(
    model: Model, kind: Hashable, block: Params, x: jax.Array, sums: dict[str, jax.Array] | None, *, moment: Moment
) -> dict[str, jax.Array]:
    def tap(site: str, value: jax.Array) -> jax.Array:
        total = moment(value.astype(jnp.float32).reshape(-1, value.shape[-1]))
        return total if sums is None else sums[site] + total

    _, totals = model.block(block, x, kind=kind, tap=tap)
    return dict(totals)
