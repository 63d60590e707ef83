"""Hessians of a block's projections: E[x x^T] of their inputs x, collected by an observer in the block.

A projection (q_proj and its like) multiplies its input x by a kernel W. The layer-wise output error of a change E of W
is tr(E^T H E) with the Hessian H = E[x x^T], the mean over positions. Projections that read one activation form an
input group and have one Hessian. An observer is a function that the block calls with the input of every group. This
module knows a Model and batches, no files.
Letters: b samples of t positions, d channels between blocks, i input channels of a group (d_in).
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.clustering.drift_correction import LayerStatistics
from cluscomp_jax.core.second_moments import cross_moment, dot, second_moment, symmetric
from cluscomp_jax.core.trees import Params, flatten
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.streams import Batch

Sums = dict[str, dict[str, Any]]
"""{input group: {name of a statistic: float32 array, the blocks of `second_moment` under "hessian"}}."""
_TOGETHER_BYTES = 2**30


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
    groups: Sequence[str],
    block: Params,
    batches: Iterable[Batch],
    *,
    original: Params | None = None,
) -> dict[str, LayerStatistics]:
    """Returns {input group: its Hessian, and its drift statistics where `original` is given}.

    All are float32 means over all positions of all batches, where the model weighs none (`Observer`).

    Args:
      model: the decoder.
      layer_type: what distinguishes the block's program (`Model.layer_type`).
      groups: input groups, keys of `model.input_groups`; the parts of the block after them are not computed.
      block: parameters of the block at this point of the run, dense or compressed.
      batches: inputs of the block; with `original`, those of both streams.
      original: the block's dense parameters. They give the drift, the difference of the original stream's inputs from
        the compressed stream's. None: the Hessian alone.

    Raises:
      ValueError: no batch.
    """
    fixed = {"model": model, "layer_type": layer_type, "groups": tuple(groups), "block": block}
    add = partial(add_products, **fixed) if original is None else partial(add_pair, original=original, **fixed)
    return {group: _statistics(**means) for group, means in _means(batches, add).items()}


def _statistics(hessian: tuple[jax.Array, ...], **others: jax.Array) -> LayerStatistics:
    return LayerStatistics(assemble(hessian) if len(hessian) > 1 else hessian[0], **others)


def _means(batches: Iterable[Batch], add: Callable[[Any, Batch], Any]) -> Any:
    """Returns the sums that `add(sums or None, batch)` makes over all batches, divided by the number of positions."""
    sums: Any = None
    positions = 0
    for batch in batches:
        # Without this, batches whose sums have not been added yet would fill the device.
        jax.block_until_ready(sums)  # type: ignore[no-untyped-call]
        sums = add(sums, batch)
        positions += batch.x.shape[0] * batch.x.shape[1]
    if sums is None:
        raise ValueError("no batches to collect a Hessian of")
    return divide(sums, positions)


@partial(jax.jit, donate_argnums=0)
def divide(sums: Any, count: jax.Array) -> Any:
    """Returns the sums / count, in their own memory, which is gigabytes for the largest input group.

    Args:
      sums: a tree of float32 arrays of any shapes; donated.
      count: scalar, the number of positions, > 0.
    """
    number = jnp.asarray(count).astype(jnp.float32)
    return jax.tree.map(lambda total: total / number, sums)


assemble = jax.jit(symmetric)
"""The Hessian of its blocks: a program of its own, because it takes new memory."""


@partial(jax.jit, static_argnames=("model", "layer_type"), donate_argnames="sums")
def add_squares(
    sums: dict[str, jax.Array] | None, batch: Batch, *, model: Model, layer_type: Hashable, block: Params
) -> dict[str, jax.Array]:
    """Returns {input group: float32 [d_in]}, `sums` plus the sum of x_i^2 over a batch.

    Args:
      sums: the result so far; donated. None: zero.
      batch: x [b, t, d] of the compute dtype, weights float32 [b, t] or None.
      model: the decoder.
      layer_type: that of the block.
      block: parameters of the block.
    """

    def observer(group: str, value: jax.Array, residual: jax.Array | None, weights: jax.Array | None) -> jax.Array:
        rows, weights = _rows(value).astype(jnp.float32), _times(batch.weights, weights)
        weighted = rows if weights is None else rows * weights.reshape(-1, 1)
        total = jnp.sum(weighted * rows, axis=0)
        return total if sums is None else sums[group] + total

    return dict(model.block(block, batch.x, layer_type=layer_type, observer=observer)[1])


@partial(jax.jit, static_argnames=("model", "layer_type", "groups"), donate_argnames="sums")
def add_products(
    sums: Sums | None,
    batch: Batch,
    *,
    model: Model,
    layer_type: Hashable,
    groups: tuple[str, ...],
    block: Params,
) -> Sums:
    """Returns {input group: {"hessian": blocks}}, `sums` plus the sum of x x^T over a batch.

    Args:
      sums: the result so far; donated. None: zero.
      batch: x [b, t, d] of the compute dtype, weights float32 [b, t] or None.
      model: the decoder.
      layer_type: that of the block.
      groups: keys of `model.input_groups`.
      block: parameters of the block.
    """
    seen = _at_groups(model, layer_type, groups, block, batch.x)
    moments = {name: second_moment(found.rows, _times(batch.weights, found.weights)) for name, found in seen.items()}
    return _sum(sums, {name: {"hessian": moment} for name, moment in moments.items()})


@partial(jax.jit, static_argnames=("model", "layer_type", "groups"), donate_argnames="sums")
def add_pair(
    sums: Sums | None,
    batch: Batch,
    *,
    model: Model,
    layer_type: Hashable,
    groups: tuple[str, ...],
    block: Params,
    original: Params,
) -> Sums:
    """Returns what `add_products` does, and in addition the sum of x e^T under "drift" or "errors" (`LayerStatistics`).

    Args:
      sums: the result so far; donated. None: zero.
      batch: x and original [b, t, d] of the compute dtype, weights float32 [b, t] or None.
      model: the decoder.
      layer_type: that of the block.
      groups: keys of `model.input_groups`.
      block: parameters of the block, dense or compressed; what it weighs positions by counts.
      original: the block's dense parameters.
    """
    assert batch.original is not None
    seen = _at_groups(model, layer_type, groups, block, batch.x)
    wanted = _at_groups(model, layer_type, groups, original, batch.original)
    new: Sums = {}
    for group, now in seen.items():
        drift, weights = _difference(wanted[group].rows, now.rows), _times(batch.weights, now.weights)
        new[group] = {"hessian": second_moment(now.rows, weights)}
        onto, wanted_onto = now.residual, wanted[group].residual
        if onto is None or wanted_onto is None:
            new[group]["drift"] = cross_moment(now.rows, drift, weights)
        else:
            (path,) = model.input_groups[group]
            errors = _difference(wanted_onto, onto) + dot(drift.astype(now.rows.dtype), flatten(original)[path])
            new[group]["errors"] = cross_moment(now.rows, errors, weights)
    return _sum(sums, new)


class _Observed(NamedTuple):
    """Input [m, d_in] of a group; residual [m, d] that its output is added to, weights [..] of m positions, or None."""

    rows: jax.Array
    residual: jax.Array | None
    weights: jax.Array | None


def _at_groups(
    model: Model, layer_type: Hashable, groups: Sequence[str], block: Params, x: jax.Array
) -> dict[str, _Observed]:
    """Returns {input group: what a block's observer sees of it}."""

    def observer(name: str, value: jax.Array, residual: jax.Array | None, weights: jax.Array | None) -> Any:
        if name not in groups:
            return None
        return _Observed(_rows(value), None if residual is None else _rows(residual), weights)

    found = model.block(block, x, layer_type=layer_type, observer=observer)[1]
    return {group: found[group] for group in groups}


def _rows(value: jax.Array) -> jax.Array:
    return value.reshape(-1, value.shape[-1])


def _difference(one: jax.Array, other: jax.Array) -> jax.Array:
    return one.astype(jnp.float32) - other.astype(jnp.float32)


def _times(weights: jax.Array | None, others: jax.Array | None) -> jax.Array | None:
    return others if weights is None else weights if others is None else weights * others.reshape(weights.shape)


def _sum(sums: Sums | None, new: Sums) -> Sums:
    total: Sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    return total


def together(
    model: Model, shapes: Mapping[str, tuple[int, ...]], groups: Sequence[str], *, drift: bool
) -> list[tuple[str, ...]]:
    """Returns independent input groups in sets whose statistics are collected by one pass over the calibration.

    Args:
      model: the decoder.
      shapes: {block-relative path: shape} of the block.
      groups: one of `model.independent_groups`, or a part of it.
      drift: whether drift statistics are collected next to the Hessians, which take as much again.

    Returns:
      Sets of at most 1 GiB of statistics each, or of one group.
    """
    sets: list[list[str]] = []
    left = 0
    for group in groups:
        size = 4 * shapes[model.input_groups[group][0]][0] ** 2 * (2 if drift else 1)
        if not sets or size > left:
            sets.append([])
            left = _TOGETHER_BYTES
        sets[-1].append(group)
        left -= size
    return [tuple(names) for names in sets]
