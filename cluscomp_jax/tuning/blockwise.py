"""Block-wise error minimisation (paper section 3.3): train the codebooks of one block, indices frozen.

Pure steps over (trainable, optimiser state) and a host loop that streams batches. Knows a Model's block and
two activation streams; knows nothing of where blocks come from.
"""

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.losses import block_error
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.activations import ActivationStore
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.sharding import Sharding, gathered, put_samples, put_whole
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.tuning.optimizer import make_optimizer
from pallas_kernels.codebook_matmul import ATOMIC_GRADIENTS

Trainable = dict[str, jax.Array]
"""Float32 masters by block-relative path: codebooks [n, g], and with `BlockTuningConfig.norms` vectors [d]."""

_NORM_RATE = 0.1
"""The learning rate of vectors as a share of that of codebooks."""


class StepState(NamedTuple):
    """What a step carries: the masters, the optimiser's state, and whether all was finite so far."""

    trained: Trainable
    optimizer: Any
    alive: jax.Array


@dataclasses.dataclass(frozen=True)
class BlockTuning:
    """What tuning did to one block.

    Attributes:
      loss_before: mean squared error over the training samples before the first step.
      epoch_losses: mean loss of the steps of each epoch.
      held_out_losses: loss over the held-out samples before the first step and after each epoch; empty without any.
      chosen_epoch: the epoch whose codebooks were kept; 0 means those before the first step.
      diverged: a loss or gradient was not finite; steps stopped there and the last good codebooks count.
    """

    loss_before: float
    epoch_losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    chosen_epoch: int
    diverged: bool


def split_trainable(block: Params, *, norms: bool) -> tuple[Trainable, dict[str, Any]]:
    """Returns ({path: what is trained}, {path: what is frozen}); there a CodebookArray has None for its codebook.

    A codebook of several kernels has the path of the kernel that stores it.

    Args:
      norms: train the block's one-dimensional parameters too.
    """
    flat = trees.flatten(block)
    trained: Trainable = {}
    for path, leaf in flat.items():
        if isinstance(leaf, CodebookArray):
            flat[path] = dataclasses.replace(leaf, codebook=None)
            if leaf.tied_to is None:
                trained[path] = leaf.codebook
        elif norms and len(leaf.shape) == 1 and jnp.issubdtype(leaf.dtype, jnp.floating):
            trained[path] = leaf
    return trained, flat


def join_trainable(trained: Trainable, frozen: dict[str, Any]) -> Params:
    """Undoes `split_trainable`."""

    def joined(path: str, leaf: Any) -> Any:
        if isinstance(leaf, CodebookArray):
            return dataclasses.replace(leaf, codebook=trained[leaf.owner(path)])
        return trained.get(path, leaf)

    return trees.unflatten({path: joined(path, leaf) for path, leaf in frozen.items()})


@partial(jax.jit, static_argnames=("settings", "total_steps"))
def init_state(trained: Trainable, *, settings: BlockTuningConfig, total_steps: int) -> StepState:
    """Returns the state before the first step: float32 masters of what is trained."""
    masters = {path: value.astype(jnp.float32) for path, value in trained.items()}
    return StepState(masters, make_optimizer(settings, total_steps).init(masters), jnp.array(True))


@partial(
    jax.jit, static_argnames=("model", "layer_type", "settings", "total_steps", "sharding"), donate_argnames="state"
)
def tuning_step(
    state: StepState,
    frozen: dict[str, Any],
    x: jax.Array,
    target: jax.Array,
    *,
    model: Model,
    layer_type: Hashable,
    settings: BlockTuningConfig,
    total_steps: int,
    sharding: Sharding | None = None,
    weights: jax.Array | None = None,
) -> tuple[StepState, jax.Array]:
    """Returns (next state, loss before the step).

    Args:
      x: [b, t, d], the compressed stream's input of the block.
      target: [b, t, d], what the original block computes on the original stream.
      sharding: of the samples, where several devices share them.
      weights: float32 [b, t] of the positions, 0 at padding; None: 1.

    A step whose loss or gradient is not finite changes nothing, nor does any step after it.
    """
    # The derivative of a mean over so many outputs would vanish in float16; that of the scaled mean does not.
    scale = float(2 ** (x.size.bit_length() - 1)) if compute_dtype_of(settings) == "float16" else 1.0

    def loss_of(trained: Trainable) -> tuple[jax.Array, jax.Array]:
        loss = block_loss(
            trained,
            frozen,
            x,
            target,
            model=model,
            layer_type=layer_type,
            settings=settings,
            sharding=sharding,
            weights=weights,
        )
        return scale * loss, loss

    (_, loss), scaled = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
    gradients = jax.tree.map(lambda gradient: gradient / scale, scaled)
    alive = state.alive & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
    updates, optimizer = make_optimizer(settings, total_steps).update(gradients, state.optimizer, state.trained)
    # A vector is shared by all outputs, so it moves less than a codebook; scaling AdamW's updates scales its rate.
    updates = {path: update * (1.0 if update.ndim == 2 else _NORM_RATE) for path, update in updates.items()}
    stepped = StepState(optax.apply_updates(state.trained, updates), optimizer, alive)
    kept = jax.tree.map(partial(jnp.where, alive), stepped, state._replace(alive=alive))
    return kept, loss


def block_loss(
    trained: Trainable,
    frozen: dict[str, Any],
    x: jax.Array,
    target: jax.Array,
    *,
    model: Model,
    layer_type: Hashable,
    settings: BlockTuningConfig,
    sharding: Sharding | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Returns the error of block(x) against the target, float32 scalar (paper eq. 4)."""
    with ATOMIC_GRADIENTS(settings.atomic_gradients):
        block = gathered(join_trainable(trained, frozen), sharding)
        y = model.block(block, x.astype(compute_dtype_of(settings)), layer_type=layer_type)
    return block_error(y, target, settings=settings, weights=weights)


evaluate_block = partial(jax.jit, static_argnames=("model", "layer_type", "settings", "sharding"))(block_loss)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One block's frozen part and its data, ready to be stepped and scored."""

    model: Model
    layer_type: Hashable
    settings: BlockTuningConfig
    frozen: dict[str, Any]
    inputs: ActivationStore
    targets: ActivationStore
    total_steps: int
    sharding: Sharding | None
    weights: np.ndarray | None

    def _fixed(self, x: jax.Array) -> dict[str, Any]:
        sharding = self.sharding if self.sharding is not None and self.sharding.splits(len(x)) else None
        return {"model": self.model, "layer_type": self.layer_type, "settings": self.settings, "sharding": sharding}

    def batch(self, where: slice | np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns (inputs, target, weights of positions) of some samples, on the device."""
        put = partial(put_samples, sharding=self.sharding)
        weights = None if self.weights is None else put(self.weights[where])
        return put(self.inputs.read(where)), put(self.targets.read(where)), weights

    def step(self, state: StepState, where: np.ndarray) -> tuple[StepState, jax.Array]:
        """Returns (next state, loss before the step)."""
        x, target, weights = self.batch(where)
        stepped: tuple[StepState, jax.Array] = tuning_step(
            state, self.frozen, x, target, total_steps=self.total_steps, weights=weights, **self._fixed(x)
        )
        return stepped

    def mean_loss(self, trained: Trainable, samples: range) -> float:
        """Returns the loss over at least one sample."""
        total = 0.0
        for begin in samples[:: self.settings.batch_size]:
            where = slice(begin, min(begin + self.settings.batch_size, samples.stop))
            x, target, weights = self.batch(where)
            loss = evaluate_block(trained, self.frozen, x, target, weights=weights, **self._fixed(x))
            total += (where.stop - where.start) * float(loss)
        return total / len(samples)


def tune_block(
    model: Model,
    layer_type: Hashable,
    block: Params,
    inputs: ActivationStore,
    targets: ActivationStore,
    settings: BlockTuningConfig,
    *,
    rng: np.random.Generator,
    reporter: Reporter,
    sharding: Sharding | None = None,
    weights: np.ndarray | None = None,
) -> tuple[Params, BlockTuning]:
    """Returns (the block with tuned float32 codebooks, what happened).

    The last `settings.validation_samples` samples are never stepped on; they choose among the start and the epochs.
    Without them see `BlockTuningConfig`.

    Args:
      block: compressed parameters, block-relative paths, codebooks in the dtype they are stored in; at least one
        CodebookArray.
      inputs: the compressed stream's inputs of the block [samples, t, d].
      targets: what the block's outputs should be, see `tuning_step`.
      rng: orders the samples of each epoch.
      reporter: is told of every step.
      sharding: of the samples of a batch, where several devices share them; the block is whole on each.
      weights: float32 [samples, t] of the positions, 0 at padding and 1 on average; None: 1.
    """
    trained, frozen = split_trainable(put_whole(block, sharding), norms=settings.norms)
    stepped, validation_samples = (
        range(len(inputs) - settings.validation_samples),
        range(len(inputs) - settings.validation_samples, len(inputs)),
    )
    steps_per_epoch = len(stepped) // settings.batch_size
    total_steps = max(settings.epochs * steps_per_epoch, 1)
    problem = _Problem(model, layer_type, settings, frozen, inputs, targets, total_steps, sharding, weights)
    state = init_state(trained, settings=settings, total_steps=total_steps)
    start = jax.tree.map(jnp.copy, state.trained)
    best, chosen = start, 0
    loss_before = problem.mean_loss(start, stepped)
    held_out_losses = [problem.mean_loss(start, validation_samples)] if validation_samples else []
    epoch_losses: list[float] = []
    while len(epoch_losses) < settings.epochs and bool(state.alive):
        order = rng.permutation(len(stepped))[: steps_per_epoch * settings.batch_size]
        losses: list[jax.Array] = []
        for where in np.split(order, steps_per_epoch):
            state, loss = problem.step(state, np.sort(where))
            if losses:
                losses[-1].block_until_ready()  # else batches of steps that have not begun would fill the device
            losses.append(loss)
            reporter.advance()
        epoch_losses.append(float(np.mean(jax.device_get(losses))))
        if validation_samples and bool(state.alive):
            held_out_losses.append(problem.mean_loss(state.trained, validation_samples))
            if held_out_losses[-1] < min(held_out_losses[:-1]):
                best, chosen = jax.tree.map(jnp.copy, state.trained), len(epoch_losses)
    if not validation_samples and epoch_losses:
        # The last good step counts unless it is worse than no step at all.
        suspect = not bool(state.alive) or epoch_losses[-1] > loss_before
        if not suspect or problem.mean_loss(state.trained, stepped) < loss_before:
            best, chosen = state.trained, len(epoch_losses)
    diverged = not bool(state.alive)
    result = BlockTuning(loss_before, tuple(epoch_losses), tuple(held_out_losses), chosen, diverged)
    return join_trainable(best, frozen), result
