"""The programs of finetuning a compressed model, as `finetune` calls them, and what it holds in addition."""

from collections.abc import Iterator, Sequence
from typing import Any

from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import STORED, BlockSpec
from cluscomp_jax.plan.shapes import nbytes, with_shardings
from cluscomp_jax.training import (
    Sharding,
    Teacher,
    TrainState,
    evaluate_step,
    init_state,
    round_masters,
    split_shapes,
    state_places,
    train_step,
)


def finetuning(
    settings: Sequence[BlockSpec],
    cfg: FinetuneConfig,
    sharding: Sharding | None = None,
    *,
    stage: str = "finetune",
    evaluated: bool = True,
) -> Iterator[Program]:
    """Yields the first state, a step, and the two programs of an evaluation; how many of those there are is not known.

    Args:
      settings: the kinds of blocks, together all of the model.
      cfg: the finetuning; its model is not read. Where it follows a teacher, that is the original of the settings.
      sharding: on several devices, of which bytes are then those of one; None: on the device of the settings.
      stage: what the programs are said to belong to.
      evaluated: whether there are evaluations.
    """
    training, model, place = cfg.training, settings[0].model, settings[0].place
    blocks = (setting.compressed() for setting in _by_block(settings))
    outer = place.tree(model.outer_shapes(), STORED)
    teacher = None if training.distillation is None else _original(settings, sharding)
    trained, frozen, layout = split_shapes(blocks, outer, model, training.trainable, sharding)
    if sharding is None:
        trained, frozen = place.like(trained), place.like(frozen)

    def rows(*shape: int) -> tuple[Any, Any]:
        tokens, loss_mask = place.array(*shape, dtype="int32"), place.array(*shape, dtype="bool")
        return (
            (tokens, loss_mask)
            if sharding is None
            else with_shardings((tokens, loss_mask), (sharding.rows(len(shape)),) * 2)
        )

    traced = init_state.trace(trained, settings=training, sharding=sharding)
    yield Program(stage, "start", traced, nbytes((trained, frozen)))
    state = TrainState(*traced.out_info)
    if sharding is None:
        state = place.like(state)
    else:
        state = with_shardings(state, state_places(state, settings=training, sharding=sharding))
    held = nbytes((state, frozen, teacher))
    fixed = {"layout": layout, "settings": training}
    if evaluated:
        yield Program(stage, "round", round_masters.trace(trained, layout=layout), held, 0)
        batch = rows(training.batch_size, cfg.data.length)
        # Rounded masters are new arrays, which lie as the masters do.
        traced = evaluate_step.trace(trained, frozen, *batch, **fixed)
        yield Program(stage, "score", traced, held + nbytes((trained, batch)), 0)
    batches = rows(training.grad_accumulation_steps, training.batch_size, cfg.data.length)
    traced = train_step.trace(state, frozen, *batches, teacher, **fixed)
    best = nbytes(trained) if cfg.result == "best" else 0
    yield Program(stage, "step", traced, held + best + nbytes(batches), training.steps)


def _by_block(settings: Sequence[BlockSpec]) -> list[BlockSpec]:
    """Returns the kind of every block of the model."""
    members = {i: setting for setting in settings for i in setting.members}
    return [members[i] for i in range(settings[0].model.num_blocks)]


def _original(settings: Sequence[BlockSpec], sharding: Sharding | None) -> Teacher:
    """Returns the whole original on the device or devices."""
    model, place = settings[0].model, settings[0].place
    blocks = (setting.dense() for setting in _by_block(settings))
    _, frozen, layout = split_shapes(blocks, place.tree(model.outer_shapes(), STORED), model, (), sharding)
    return Teacher(frozen if sharding is not None else place.like(frozen), layout)
