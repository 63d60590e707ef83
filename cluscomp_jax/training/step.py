"""One optimiser step of next-token loss through a whole model, as a pure function of (state, batch).

Float32 masters and Adam's moments; activations and decoded weights in the compute dtype. A block keeps its
input for the backward pass, or the outputs of its matrix products too, and computes the rest again. Knows no files and
no loop.

On several devices it is the same program; XLA partitions it by the shardings of its arguments and of block inputs.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.sharding import OUTER, Sharding, gathered, hold
from cluscomp_jax.training.head_loss import HeadLoss, TeacherHead
from cluscomp_jax.training.partition import Layout, Span, Teacher, join_group
from cluscomp_jax.tuning.optimizer import make_optimizer
from pallas_kernels.codebook_matmul import ATOMIC_GRADIENTS

HEAD_POSITIONS = 128
"""Positions whose logits exist at one time on a device; where it has more rows, one position of each."""
_BLOCK_INPUT = "block input"
_ON_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_BLOCK_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)
_POLICIES: dict[str, Any] = {"all": None, "cheap": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class TrainState(NamedTuple):
    """What a step carries on: the masters, the optimiser's state, and how many steps were done."""

    trained: Params
    optimizer: Any
    step: Any


class StepMetrics(NamedTuple):
    """What a step measured before it moved anything.

    Attributes:
      loss: mean loss of the scored tokens, as `summed_loss` has it.
      gradient_norm: global norm of its gradient, before clipping.
      scored: how many tokens were scored.
      finite: whether loss and gradient are; if not, the step changed nothing.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    scored: jax.Array
    finite: jax.Array


@partial(jax.jit, static_argnames=("settings", "sharding"))
def init_state(trained: Params, *, settings: TrainingConfig, sharding: Sharding | None = None) -> TrainState:
    """Returns the state before the first step of these float32 masters, sharded as `sharding` says."""
    optimizer = _optimizer(settings).init(trained)
    return _kept(TrainState(trained, optimizer, jnp.array(0, jnp.int32)), settings, sharding)


def state_places(state: TrainState, *, settings: TrainingConfig, sharding: Sharding) -> Any:
    """Returns a TrainState of shardings: of masters as `sharding` says, of moments as of their masters."""
    places = trees.map_by_path(sharding.of, state.trained)
    moments = optax.tree_map_params(
        _optimizer(settings),
        lambda _, place: place,
        state.optimizer,
        places,
        transform_non_params=lambda _: sharding.everywhere,
    )
    everywhere: Any = sharding.everywhere
    return TrainState(places, moments, everywhere)


def _kept(state: TrainState, settings: TrainingConfig, sharding: Sharding | None) -> TrainState:
    """Returns the state, constrained to its shardings."""
    if sharding is None:
        return state
    held: TrainState = jax.tree.map(hold, state, state_places(state, settings=settings, sharding=sharding))
    return held


def summed_loss(
    trained: Params,
    frozen: Params,
    tokens: jax.Array,
    loss_mask: jax.Array,
    teacher: Teacher | None = None,
    *,
    layout: Layout,
    settings: TrainingConfig,
) -> jax.Array:
    """Returns the loss summed over the scored tokens, float32.

    That of a token is -log p(token | tokens before it), nats; with a teacher, as `DistillationConfig` mix it.

    Args:
      trained: of `split_params`.
      frozen: of `split_params`.
      tokens: int32 [b, t], t >= 2.
      loss_mask: bool [b, t]; the first position of a row is never scored, whatever it says.
      teacher: takes part only where the settings have a distillation.
      layout: of `split_params`.
      settings: their compute dtype, distillation and gradient mode count here, and what they recompute and offload.
    """
    parts = 1 if layout.sharding is None else layout.sharding.row_parts
    loss, followed = HeadLoss(layout.model, parts * HEAD_POSITIONS, layout.sharding), None
    if teacher is not None and settings.distillation is not None:
        seen = _through_blocks({}, teacher.params, tokens, layout=teacher.layout, settings=settings)
        followed = TeacherHead(gathered(teacher.params[OUTER], teacher.layout.sharding), seen[:, :-1])
        loss = dataclasses.replace(loss, teacher=teacher.layout.model, distillation=settings.distillation)
    with ATOMIC_GRADIENTS(settings.atomic_gradients):
        x = _through_blocks(trained, frozen, tokens, layout=layout, settings=settings)
        # What is frozen is gathered once, not for every chunk of the loss.
        outer = (trained.get(OUTER, {}), gathered(frozen.get(OUTER, {}), layout.sharding))
        return loss(*outer, x[:, :-1], tokens[:, 1:], loss_mask[:, 1:], followed)


def _through_blocks(
    trained: Params, frozen: Params, tokens: jax.Array, *, layout: Layout, settings: TrainingConfig
) -> jax.Array:
    """Returns x [b, t, d] after the last block."""
    model, sharding = layout.model, layout.sharding
    policy = _ON_HOST if settings.offload_inputs else _POLICIES[settings.remat_policy]

    def joined(trained: Params, frozen: Params) -> Params:
        return gathered(join_group(trained, frozen), sharding)

    def by_rows(x: jax.Array) -> jax.Array:
        return x if sharding is None else sharding.by_rows(x)

    outer = joined(trained.get(OUTER, {}), frozen.get(OUTER, {}))
    x = by_rows(model.embed(outer, tokens, dtype=jnp.dtype(compute_dtype_of(settings))))

    def block(layer_type: Any, x: jax.Array, parts: tuple[Params, Params]) -> tuple[jax.Array, None]:
        x = checkpoint_name(x, _BLOCK_INPUT)  # type: ignore[no-untyped-call]
        return by_rows(model.block(joined(*parts), x, layer_type=layer_type)), None

    def once(
        section: tuple[Span, ...], x: jax.Array, stacks: dict[str, tuple[Params, Params]]
    ) -> tuple[jax.Array, None]:
        for span in section:
            one = partial(block, span.layer_type)
            # Inside a scan XLA cannot merge the second forward pass with the first, so no barrier is needed.
            x, _ = jax.lax.scan(jax.checkpoint(one, prevent_cse=False, policy=policy), x, stacks[span.name])
        return x, None

    for section in layout.sections:
        stacks = {span.name: (trained.get(span.name, {}), frozen.get(span.name, {})) for span in section}
        repeats = section[0].repeats
        if repeats == 1:
            x, _ = once(section, x, stacks)
        else:
            rounds = jax.tree.map(lambda leaf, of=repeats: leaf.reshape(of, -1, *leaf.shape[1:]), stacks)
            x, _ = jax.lax.scan(partial(once, section), x, rounds)
    return x


@partial(jax.jit, static_argnames=("layout", "settings"), donate_argnames="state")
def train_step(
    state: TrainState,
    frozen: Params,
    tokens: jax.Array,
    loss_mask: jax.Array,
    teacher: Teacher | None = None,
    *,
    layout: Layout,
    settings: TrainingConfig,
) -> tuple[TrainState, StepMetrics]:
    """Returns (next state, what was measured before it). A step that is not finite leaves the state as it was.

    Args:
      state: is donated.
      frozen: of `split_params`.
      tokens: int32 [a, b, t]: a batches, passed through one after another.
      loss_mask: bool [a, b, t], as in `summed_loss`; at least one true after the first position of a row.
      teacher: as in `summed_loss`.
      layout: of `split_params`.
      settings: of the run.
    """
    loss_of = partial(summed_loss, layout=layout, settings=settings)

    def add(totals: tuple[jax.Array, Params], batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, totals, jax.value_and_grad(loss_of)(state.trained, frozen, *batch, teacher)), None

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
    (total, gradients), _ = jax.lax.scan(add, nothing, (tokens, loss_mask))
    # Of the sum the derivatives stay in float16's range; of the mean over many tokens they would not.
    count = jnp.maximum(jnp.sum(loss_mask[..., 1:]), 1)
    divisor = count.astype(jnp.float32)
    gradients = jax.tree.map(lambda gradient: gradient / divisor, gradients)
    loss, norm = total / divisor, optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer = _optimizer(settings).update(gradients, state.optimizer, state.trained)
    stepped = TrainState(
        optax.apply_updates(state.trained, _scaled(updates, settings.vector_lr_scale)), optimizer, state.step + 1
    )
    kept = jax.tree.map(partial(jnp.where, finite), stepped, state)
    return _kept(kept, settings, layout.sharding), StepMetrics(loss, norm, count, finite)


def _stacked(name: str) -> bool:
    """Returns whether an array of the trained tree holds one of each block of a span."""
    return not name.startswith(f"{OUTER}/")


def _optimizer(settings: TrainingConfig) -> optax.GradientTransformation:
    return make_optimizer(settings, settings.steps, stacked=_stacked)


def _scaled(updates: Params, vector_lr_scale: float) -> Params:
    """A vector is shared by all outputs, so it moves less than a codebook; scaling updates scales AdamW's rate."""

    def scaled(name: str, update: jax.Array) -> jax.Array:
        return update if update.ndim - _stacked(name) > 1 else vector_lr_scale * update

    return trees.map_by_path(scaled, updates)


@partial(jax.jit, static_argnames=("layout", "settings"))
def evaluate_step(
    trained: Params,
    frozen: Params,
    tokens: jax.Array,
    loss_mask: jax.Array,
    *,
    layout: Layout,
    settings: TrainingConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns (summed -log p, scored tokens) of one batch int32 [b, t]."""
    total = summed_loss(trained, frozen, tokens, loss_mask, layout=layout, settings=settings)
    return total, jnp.sum(loss_mask[:, 1:])
