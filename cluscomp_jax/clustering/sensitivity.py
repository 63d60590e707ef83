"""Sensitivity: how much an error of each kernel, and of each of its outputs, raises the loss of the whole model.

To second order a change D of a kernel raises the loss by half of sum_io F_io D_io^2, F the diagonal of the empirical
Fisher information: squared gradients of the loss of single samples (LeCun et al. 1989; Kim et al. 2024). Quantisation
spreads its error over a kernel about evenly, so that one number is enough: sum(F) mean(W^2) / 2 is the loss per unit
of relative squared error. Error feedback removes the part of an output's error that other channels can compensate;
what remains of E[x^T x] is sum_i R_ii^2 (`cluscomp_jax.clustering.error_feedback`). Outputs of one kernel differ by
sum_i F_io. Knows a Model and a ParamSource.
"""

from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.error_feedback import HessianFactor, factor_hessian
from cluscomp_jax.clustering.hessian import collect_hessians, together
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.losses import token_nll
from cluscomp_jax.core.sensitivities import Sensitivities
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.activations import ActivationStore, run_through
from cluscomp_jax.models.calibration import Calibration, Embeddings
from cluscomp_jax.models.model import Model, run_block, run_embed
from cluscomp_jax.models.source import ParamSource
from cluscomp_jax.models.streams import Batch
from cluscomp_jax.runtime.reporter import Reporter

_T = TypeVar("_T")

SAMPLES = 8
"""Samples of which gradients are computed; more change the choice of codebooks little."""
_LEAST_WEIGHT, _LARGEST_WEIGHT = 0.1, 8.0
"""Of an output, times the mean of its kernel: sums over so few samples are uncertain where they are extreme."""


class KernelSquares(NamedTuple):
    """Squared gradients of a kernel [d_in, d_out].

    Attributes:
      cost: sum(F) mean(W^2), float32.
      outputs: sum_i F_io, float32 [d_out].
    """

    cost: jax.Array
    outputs: jax.Array


def sensitivities(
    model: Model,
    source: ParamSource,
    calibration: Calibration,
    *,
    settings: ClusterConfig,
    work_dir: Path,
    reporter: Reporter,
) -> Sensitivities:
    """Returns what errors of every kernel and of its outputs cost.

    Memory holds one block. The inputs of all blocks are in files in `work_dir`, 4 bytes a number.

    Args:
      model: the decoder.
      source: its dense parameters.
      calibration: tokens int [samples, length], or packed embeddings with tokens; the first 8 samples are used.
      settings: whether and how error feedback will be used.
      work_dir: scratch.
      reporter: receives progress.

    Raises:
      InputError: embeddings whose first samples have no token to predict.
      FloatingPointError: a gradient is not finite.
    """
    tokens, labelled, weights = _labels(calibration)
    reporter.start("sensitivity", 2 * model.num_blocks, "blocks")
    outer = jax.tree.map(jnp.asarray, source.load_outer())
    if isinstance(calibration, Embeddings):
        embedded = np.asarray(calibration.inputs[:SAMPLES]).astype(np.float32)
    else:
        dtype = jnp.dtype("float32")
        embedded = np.concatenate([np.asarray(run_embed(outer, row[None], model=model, dtype=dtype)) for row in tokens])
    stores = [_store(work_dir, 0, embedded.shape)]
    stores[0].write(slice(0, len(tokens)), embedded)
    kept: dict[str, float] = {}
    for i in range(model.num_blocks):
        stores.append(_store(work_dir, i + 1, stores[0].shape))
        kept |= _forward(model, source, i, stores[-2], stores[-1], settings, weights)
        reporter.advance()
    slopes = [
        head_slope(outer, x, tokens[where], None if labelled is None else labelled[where], model=model)
        for where, x in stores[-1].batches(1)
    ]
    count = tokens.size if labelled is None else int(labelled.sum())
    del outer
    stores.pop().delete()
    result: dict[str, float] = {}
    outputs: dict[str, np.ndarray] = {}
    for i in reversed(range(model.num_blocks)):
        squares = _backward(model, source, i, stores[-1], slopes)
        stores.pop().delete()
        result |= _named(model, i, {path: float(of.cost) / (2 * count) for path, of in squares.items()})
        outputs |= _named(model, i, {path: np.asarray(of.outputs) for path, of in squares.items()})
        reporter.advance()
    costs = {path: value * kept.get(path, 1.0) for path, value in sorted(result.items())}
    return Sensitivities(costs, {path: outputs[path] for path in costs})


def output_weights(squares: np.ndarray) -> np.ndarray:
    """Returns the weights float32 [d_out], mean 1, of the squared errors of a kernel's outputs.

    They are the square roots of the sensitivities, limited. The sensitivities themselves gain nothing on text of
    another kind than the calibration (docs/experiments.md, "Outputs by their sensitivities").

    Args:
      squares: [d_out] >= 0, of `Sensitivities.outputs`. All 0: all weights are 1.
    """
    squares = squares.astype(np.float64)
    if not squares.any():
        return np.ones(len(squares), np.float32)
    roots = np.sqrt(squares)
    limited = np.clip(roots / roots.mean(), _LEAST_WEIGHT, _LARGEST_WEIGHT)
    weights: np.ndarray = (limited / limited.mean()).astype(np.float32)
    return weights


def _labels(calibration: Calibration) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Returns (tokens of the first samples, bool of the same shape: which are labels, or None for all but the first;
    weights of their positions, or None for 1).
    """
    if not isinstance(calibration, Embeddings):
        return np.asarray(calibration[:SAMPLES]), None, None
    assert calibration.tokens is not None
    tokens = np.asarray(calibration.tokens[:SAMPLES])
    weights = None if calibration.weights is None else calibration.weights[:SAMPLES]
    labelled = tokens >= 0
    if not labelled[:, 1:].any():
        raise InputError(
            f"none of the first {len(tokens)} calibration samples has a token after its first position, and "
            "bits are spent by a loss of tokens; give their tokens, or set mixed_precision to 'none'"
        )
    return np.maximum(tokens, 0), None if labelled.all() else labelled, weights


def _forward(
    model: Model,
    source: ParamSource,
    i: int,
    inputs: ActivationStore,
    outputs: ActivationStore,
    settings: ClusterConfig,
    weights: np.ndarray | None,
) -> dict[str, float]:
    """Writes the outputs of block i; returns {path: share of an error that error feedback leaves}, empty without it."""
    block, layer_type = _block(source, i), model.layer_type(i)
    step = partial(run_block, block, model=model, layer_type=layer_type)
    run_through(step, inputs, outputs, batch_size=1, dtype=jnp.dtype("float32"))
    if not settings.error_feedback:
        return {}
    return _named(model, i, _share_after_feedback(model, layer_type, block, inputs, settings, weights))


def _backward(
    model: Model, source: ParamSource, i: int, inputs: ActivationStore, slopes: list[jax.Array]
) -> dict[str, KernelSquares]:
    """Returns {block-relative path: squares over all samples}; `slopes`, by block i's outputs, become those by its
    inputs."""
    block, layer_type = _block(source, i), model.layer_type(i)
    totals: dict[str, KernelSquares] = {}
    for j, (_, x) in enumerate(inputs.batches(1)):
        squares, slopes[j] = block_slope(block, x, slopes[j], model=model, layer_type=layer_type)
        totals = jax.tree.map(jnp.add, totals, squares) if totals else squares
    found: dict[str, KernelSquares] = jax.device_get(totals)
    for path, squared in found.items():
        if not np.isfinite(squared.outputs).all():
            raise FloatingPointError(
                f"{model.blocks_path}/{i}/{path}: the gradient of the model's loss by it is not finite, and bits are "
                "spent by it; check the weights, or set mixed_precision to 'none'"
            )
    return found


def scratch_bytes(num_blocks: int, shape: tuple[int, ...], width: int) -> int:
    """Returns the bytes of the scratch files of `sensitivities`: the inputs of all blocks, and their outputs.

    Args:
      num_blocks: of the model.
      shape: (samples, length) of the tokens.
      width: channels between blocks.
    """
    samples, length = shape
    return (num_blocks + 1) * min(samples, SAMPLES) * length * width * 4


def _store(work_dir: Path, i: int, shape: tuple[int, ...]) -> ActivationStore:
    return ActivationStore(work_dir / f"sensitivity-{i}.bin", (shape[0], shape[1], shape[2]), np.float32)


def _block(source: ParamSource, i: int) -> Params:
    block: Params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), source.load_block(i))
    return block


def _named(model: Model, i: int, values: dict[str, _T]) -> dict[str, _T]:
    return {f"{model.blocks_path}/{i}/{path}": value for path, value in values.items()}


def _share_after_feedback(
    model: Model,
    layer_type: Hashable,
    block: Params,
    inputs: ActivationStore,
    settings: ClusterConfig,
    weights: np.ndarray | None,
) -> dict[str, float]:
    """Returns {block-relative path: sum_i R_ii^2 / sum_i E[x_i^2]}, the share that error feedback leaves."""
    shares: dict[str, float] = {}
    shapes = {path: leaf.shape for path, leaf in trees.flatten(block).items()}
    for independent in model.independent_groups:
        for groups in together(model, shapes, independent, drift=False):
            batches = (
                Batch(jnp.asarray(x), None, None if weights is None else jnp.asarray(weights[where]))
                for where, x in inputs.batches(1)
            )
            found = collect_hessians(model, layer_type, groups, block, batches)
            for group in groups:
                hessian = found.pop(group).hessian
                factor = factor_hessian(hessian, damping=settings.damping, shrinkage=settings.shrinkage)
                left = float(share_left(hessian, factor))
                shares |= dict.fromkeys(model.input_groups[group], left)
                del hessian, factor  # the next ones are collected without it on the device
    return shares


@jax.jit
def share_left(hessian: jax.Array, factor: HessianFactor) -> jax.Array:
    """Returns sum_i R_ii^2 / sum_i E[x_i^2] of a Hessian and its factor; 1 where it is more, or not a number."""
    left = jnp.sum(factor.channel_weights) / jnp.trace(hessian)
    return jnp.where(jnp.isfinite(left), jnp.minimum(left, 1.0), 1.0)


@partial(jax.jit, static_argnames="model")
def head_slope(
    outer: Params, x: jax.Array, tokens: jax.Array, labelled: jax.Array | None = None, *, model: Model
) -> jax.Array:
    """Returns the gradient [1, t, d] of the summed loss of a sample's next tokens by the last block's output.

    `labelled` is bool [1, t], the tokens whose loss counts; None: all but the first.
    """

    def loss(x: jax.Array) -> jax.Array:
        losses = token_nll(model.head(outer, x[:, :-1]), tokens[:, 1:])
        return jnp.sum(losses if labelled is None else jnp.where(labelled[:, 1:], losses, 0.0))

    slope: jax.Array = jax.grad(loss)(jnp.asarray(x))
    return slope


@partial(jax.jit, static_argnames=("model", "layer_type"))
def block_slope(
    block: Params, x: jax.Array, slope: jax.Array, *, model: Model, layer_type: Hashable
) -> tuple[dict[str, KernelSquares], jax.Array]:
    """Returns ({path: squares of one sample}, the gradient by the block's input)."""
    flat = trees.flatten(block)
    kernels = {path: flat[path] for paths in model.input_groups.values() for path in paths}

    def run(kernels: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y: jax.Array = model.block(trees.unflatten(flat | kernels), x, layer_type=layer_type)
        return y

    _, back = jax.vjp(run, kernels, jnp.asarray(x))
    gradients, before = back(slope)

    def squares(path: str) -> KernelSquares:
        outputs = jnp.sum(jnp.square(gradients[path]), axis=0)
        return KernelSquares(jnp.sum(outputs) * jnp.mean(jnp.square(kernels[path])), outputs)

    return {path: squares(path) for path in kernels}, before
