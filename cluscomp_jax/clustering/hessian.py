"""Input moments of a block's kernels, taken through the block's tap. Knows a Model and batches, no files."""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.clustering.drift_correction import LayerStatistics
from cluscomp_jax.core.trees import Params, flatten
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.streams import Batch


def collect_hessian_diagonals(
    model: Model, layer_type: Hashable, block: Params, batches: Iterable[Batch]
) -> dict[str, jax.Array]:
    """Returns {block-relative kernel path: E[x_i^2] float32 [d_in]} over all positions of all batches.

    Args:
      block: parameters of the block, block-relative paths.
      batches: inputs of the block, of which the compressed stream's count.

    Raises:
      ValueError: no batch.
    """
    means = _means(batches, partial(add_squares, model=model, layer_type=layer_type, block=block))
    return {path: means[group] for group, paths in model.input_groups.items() for path in paths}


def collect_hessians(
    model: Model,
    layer_type: Hashable,
    group: str,
    block: Params,
    batches: Iterable[Batch],
    *,
    original: Params | None = None,
) -> LayerStatistics:
    """Returns the second moments of one site's inputs over all positions of all batches.

    Args:
      site: of `model.sites`; the parts of the block behind it are not computed.
      block: parameters of the block as they are by now, dense or compressed.
      batches: inputs of the block, with `original` those of both streams.
      original: the block's dense parameters; with them the moments tell how far the compressed stream has drifted.

    Raises:
      ValueError: no batch.
    """
    fixed = {"model": model, "layer_type": layer_type, "group": group, "block": block}
    if original is None:
        return LayerStatistics(**_means(batches, partial(add_products, **fixed)))
    return LayerStatistics(**_means(batches, partial(add_pair, original=original, **fixed)))


def _means(batches: Iterable[Batch], add: Callable[[Any, Batch], dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Returns the sums that `add(sums or None, batch)` makes over all batches, divided by the number of positions."""
    sums: dict[str, jax.Array] | None = None
    positions = 0
    for batch in batches:
        # Else batches that nothing has begun to add would fill the device.
        jax.block_until_ready(sums)  # type: ignore[no-untyped-call]
        sums = add(sums, batch)
        positions += batch.x.shape[0] * batch.x.shape[1]
    if sums is None:
        raise ValueError("no batches to take the moments of")
    means: dict[str, jax.Array] = divide(sums, positions)
    return means


@partial(jax.jit, donate_argnums=0)
def divide(sums: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    """Returns the sums divided by `count`, in their own memory: of the largest site they are gigabytes."""
    return {name: total / count for name, total in sums.items()}


@partial(jax.jit, static_argnames=("model", "layer_type"), donate_argnames="sums")
def add_squares(
    sums: dict[str, jax.Array] | None, batch: Batch, *, model: Model, layer_type: Hashable, block: Params
) -> dict[str, jax.Array]:
    """Adds the sums of x_i^2 of a batch, float32 [d_in] for each site, to `sums` (None: zero)."""

    def observer(group: str, value: jax.Array, residual: jax.Array | None) -> jax.Array:
        rows = _rows(value)
        total = jnp.sum(_weighted(rows, batch.weights) * rows, axis=0)
        return total if sums is None else sums[group] + total

    return dict(model.block(block, batch.x, layer_type=layer_type, observer=observer)[1])


@partial(jax.jit, static_argnames=("model", "layer_type", "group"), donate_argnames="sums")
def add_products(
    sums: dict[str, jax.Array] | None, batch: Batch, *, model: Model, layer_type: Hashable, group: str, block: Params
) -> dict[str, jax.Array]:
    """Adds the sums of x x^T of a batch, float32 [d_in, d_in], at one site to `sums` (None: zero)."""
    value, _ = _at_group(model, layer_type, group, block, batch.x)
    return _sum(sums, {"hessian": _product(_weighted(value, batch.weights), value)})


@partial(jax.jit, static_argnames=("model", "layer_type", "group"), donate_argnames="sums")
def add_pair(
    sums: dict[str, jax.Array] | None,
    batch: Batch,
    *,
    model: Model,
    layer_type: Hashable,
    group: str,
    block: Params,
    original: Params,
) -> dict[str, jax.Array]:
    """Adds what `add_products` adds, and the sums of x e^T of the input's and the residual's drift."""
    assert batch.original is not None
    x, onto = _at_group(model, layer_type, group, block, batch.x)
    wanted, wanted_onto = _at_group(model, layer_type, group, original, batch.original)
    drift, weighted = wanted - x, _weighted(x, batch.weights)
    new = {"hessian": _product(weighted, x)}
    if onto is None or wanted_onto is None:
        new["drift"] = _product(weighted, drift)
    else:
        (path,) = model.input_groups[group]
        kernel = flatten(original)[path].astype(jnp.float32)
        new["errors"] = _product(weighted, wanted_onto - onto + jnp.dot(drift, kernel, precision="highest"))
    return _sum(sums, new)


def _at_group(
    model: Model, layer_type: Hashable, group: str, block: Params, x: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns (input float32 [m, d_in] of the site, residual float32 [m, d] that its output is added to or None)."""

    def observer(name: str, value: jax.Array, residual: jax.Array | None) -> Any:
        return (_rows(value), None if residual is None else _rows(residual)) if name == group else None

    found: tuple[jax.Array, jax.Array | None] = model.block(block, x, layer_type=layer_type, observer=observer)[1][
        group
    ]
    return found


def _rows(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float32).reshape(-1, value.shape[-1])


def _weighted(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    return rows if weights is None else rows * weights.reshape(-1, 1)


def _product(rows: jax.Array, others: jax.Array) -> jax.Array:
    return jnp.dot(rows.T, others, precision="highest")


def _sum(sums: dict[str, jax.Array] | None, new: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return new if sums is None else {name: sums[name] + value for name, value in new.items()}
