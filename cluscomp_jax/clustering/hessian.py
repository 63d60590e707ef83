"""Hessians of a block's projections: E[x x^T] of their inputs x, collected by an observer in the block.

A projection (q_proj and its like) multiplies its input x by a kernel W. The layer-wise output error of a change E of W
is tr(E^T H E) with the Hessian H = E[x x^T], the mean over positions. Projections that read one activation form an
input group and have one Hessian. An observer is a function that the block calls with the input of every group. This
module knows a Model and batches, no files.
Letters: b samples of t positions, d channels between blocks, i input channels of a group (d_in).
"""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.clustering.drift_correction import LayerStatistics
from cluscomp_jax.core.second_moments import cross_moment, dot, second_moment, symmetric
from cluscomp_jax.core.trees import Params, flatten
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.streams import Batch

Sums = dict[str, Any]
"""{name: float32 array}, the blocks of `second_moment` under "hessian"."""


def collect_hessian_diagonals(
    model: Model, layer_type: Hashable, block: Params, batches: Iterable[Batch]
) -> dict[str, jax.Array]:
    """Returns {block-relative kernel path: the Hessian's diagonal E[x_i^2], float32 [d_in]}, means over all positions.

    Args:
      model: the decoder.
      layer_type: what distinguishes the block's program (`Model.layer_type`).
      block: parameters of the block by block-relative paths.
      batches: inputs of the block; only `x` and `weights` are read.

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
    """Returns the Hessian of one input group, and its drift statistics where `original` is given.

    All are float32 means over all positions of all batches.

    Args:
      model: the decoder.
      layer_type: what distinguishes the block's program (`Model.layer_type`).
      group: an input group, a key of `model.input_groups`; the parts of the block after it are not computed.
      block: parameters of the block at this point of the run, dense or compressed.
      batches: inputs of the block; with `original`, those of both streams.
      original: the block's dense parameters. They give the drift, the difference of the original stream's inputs from
        the compressed stream's. None: the Hessian alone.

    Raises:
      ValueError: no batch.
    """
    fixed = {"model": model, "layer_type": layer_type, "group": group, "block": block}
    add = partial(add_products, **fixed) if original is None else partial(add_pair, original=original, **fixed)
    means = _means(batches, add)
    blocks = means.pop("hessian")
    return LayerStatistics(assemble(blocks) if len(blocks) > 1 else blocks[0], **means)


def _means(batches: Iterable[Batch], add: Callable[[Any, Batch], Sums]) -> Sums:
    """Returns the sums that `add(sums or None, batch)` makes over all batches, divided by the number of positions."""
    sums: Sums | None = None
    positions = 0
    for batch in batches:
        # Without this, batches whose sums have not been added yet would fill the device.
        jax.block_until_ready(sums)  # type: ignore[no-untyped-call]
        sums = add(sums, batch)
        positions += batch.x.shape[0] * batch.x.shape[1]
    if sums is None:
        raise ValueError("no batches to collect a Hessian of")
    means: Sums = divide(sums, positions)
    return means


@partial(jax.jit, donate_argnums=0)
def divide(sums: Sums, count: jax.Array) -> Sums:
    """Returns the sums / count, in their own memory, which is gigabytes for the largest input group.

    Args:
      sums: float32 arrays of any shapes; donated.
      count: scalar, the number of positions, > 0.
    """
    number = jnp.asarray(count).astype(jnp.float32)
    means: Sums = jax.tree.map(lambda total: total / number, sums)
    return means


assemble = jax.jit(symmetric)
"""The Hessian of its blocks: a program of its own, because it takes new memory."""


@partial(jax.jit, static_argnames=("model", "layer_type"), donate_argnames="sums")
def add_squares(sums: Sums | None, batch: Batch, *, model: Model, layer_type: Hashable, block: Params) -> Sums:
    """Returns {input group: float32 [d_in]}, `sums` plus the sum of x_i^2 over a batch.

    Args:
      sums: the result so far; donated. None: zero.
      batch: x [b, t, d] of the compute dtype, weights float32 [b, t] or None.
      model: the decoder.
      layer_type: that of the block.
      block: parameters of the block.
    """

    def observer(group: str, value: jax.Array, residual: jax.Array | None) -> jax.Array:
        rows = _rows(value).astype(jnp.float32)
        weighted = rows if batch.weights is None else rows * batch.weights.reshape(-1, 1)
        total = jnp.sum(weighted * rows, axis=0)
        return total if sums is None else sums[group] + total

    return dict(model.block(block, batch.x, layer_type=layer_type, observer=observer)[1])


@partial(jax.jit, static_argnames=("model", "layer_type", "group"), donate_argnames="sums")
def add_products(
    sums: Sums | None, batch: Batch, *, model: Model, layer_type: Hashable, group: str, block: Params
) -> Sums:
    """Returns {"hessian": blocks}, `sums` plus the sum of x x^T over a batch, for one input group.

    Args:
      sums: the result so far; donated. None: zero.
      batch: x [b, t, d] of the compute dtype, weights float32 [b, t] or None.
      model: the decoder.
      layer_type: that of the block.
      group: a key of `model.input_groups`.
      block: parameters of the block.
    """
    value, _ = _at_group(model, layer_type, group, block, batch.x)
    return _sum(sums, {"hessian": second_moment(value, batch.weights)})


@partial(jax.jit, static_argnames=("model", "layer_type", "group"), donate_argnames="sums")
def add_pair(
    sums: Sums | None,
    batch: Batch,
    *,
    model: Model,
    layer_type: Hashable,
    group: str,
    block: Params,
    original: Params,
) -> Sums:
    """Returns what `add_products` does, and in addition the sum of x e^T under "drift" or "errors" (`LayerStatistics`).

    Args:
      sums: the result so far; donated. None: zero.
      batch: x and original [b, t, d] of the compute dtype, weights float32 [b, t] or None.
      model: the decoder.
      layer_type: that of the block.
      group: a key of `model.input_groups`.
      block: parameters of the block, dense or compressed.
      original: the block's dense parameters.
    """
    assert batch.original is not None
    x, onto = _at_group(model, layer_type, group, block, batch.x)
    wanted, wanted_onto = _at_group(model, layer_type, group, original, batch.original)
    drift = _difference(wanted, x)
    new: Sums = {"hessian": second_moment(x, batch.weights)}
    if onto is None or wanted_onto is None:
        new["drift"] = cross_moment(x, drift, batch.weights)
    else:
        (path,) = model.input_groups[group]
        errors = _difference(wanted_onto, onto) + dot(drift.astype(x.dtype), flatten(original)[path])
        new["errors"] = cross_moment(x, errors, batch.weights)
    return _sum(sums, new)


def _at_group(
    model: Model, layer_type: Hashable, group: str, block: Params, x: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns (input [m, d_in] of the group, residual [m, d] that its output is added to or None)."""

    def observer(name: str, value: jax.Array, residual: jax.Array | None) -> Any:
        return (_rows(value), None if residual is None else _rows(residual)) if name == group else None

    found: tuple[jax.Array, jax.Array | None] = model.block(block, x, layer_type=layer_type, observer=observer)[1][
        group
    ]
    return found


def _rows(value: jax.Array) -> jax.Array:
    return value.reshape(-1, value.shape[-1])


def _difference(one: jax.Array, other: jax.Array) -> jax.Array:
    return one.astype(jnp.float32) - other.astype(jnp.float32)


def _sum(sums: Sums | None, new: Sums) -> Sums:
    total: Sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    return total
