"""Input moments of a block's kernels, taken through the block's tap. Knows a Model and batches, no files."""

from collections.abc import Hashable, Iterable
from functools import partial

import jax
import jax.numpy as jnp

from cluscomp_jax.model import Model
from cluscomp_jax.trees import Params


def channel_moments(model: Model, kind: Hashable, block: Params, batches: Iterable[jax.Array]) -> dict[str, jax.Array]:
    """Returns {block-relative kernel path: E[x_i^2] float32 [d_in]} over all positions of all batches.

    Args:
      block: dense parameters of the block, block-relative paths.
      batches: inputs [b, t, d] of the block, the stream whose moments are wanted.
    """
    sums: dict[str, jax.Array] | None = None
    positions = 0
    for x in batches:
        batch = _site_sums(model, kind, block, x)
        sums = batch if sums is None else {site: sums[site] + batch[site] for site in batch}
        positions += x.shape[0] * x.shape[1]
    if sums is None:
        raise ValueError("channel_moments: no batches")
    return {path: sums[site] / positions for site, paths in model.sites.items() for path in paths}


def second_moments(model: Model, kind: Hashable, block: Params, batches: Iterable[jax.Array]) -> dict[str, jax.Array]:
    """Returns {site: E[x x^T] float32 [d_in, d_in]} over all positions of all batches; arguments as above.

    Kernels of one site read the same input and share its moments.
    """
    sums: dict[str, jax.Array] | None = None
    positions = 0
    for x in batches:
        sums = _add_products(model, kind, block, x, sums)
        positions += x.shape[0] * x.shape[1]
    if sums is None:
        raise ValueError("second_moments: no batches")
    return {site: total / positions for site, total in sums.items()}


@partial(jax.jit, static_argnames=("model", "kind"))
def _site_sums(model: Model, kind: Hashable, block: Params, x: jax.Array) -> dict[str, jax.Array]:
    def tap(site: str, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(value.astype(jnp.float32)), axis=tuple(range(value.ndim - 1)))

    _, sums = model.block(block, x, kind=kind, tap=tap)
    return dict(sums)


@partial(jax.jit, static_argnames=("model", "kind"), donate_argnames="sums")
def _add_products(
    model: Model, kind: Hashable, block: Params, x: jax.Array, sums: dict[str, jax.Array] | None
) -> dict[str, jax.Array]:
    def tap(site: str, value: jax.Array) -> jax.Array:
        rows = value.astype(jnp.float32).reshape(-1, value.shape[-1])
        product = jnp.dot(rows.T, rows, precision="highest")
        return product if sums is None else sums[site] + product

    _, products = model.block(block, x, kind=kind, tap=tap)
    return dict(products)
