"""The programs of finetuning a compressed model, as `finetune` calls them, and what it holds in addition."""

from collections.abc import Iterator, Sequence
from typing import Any

from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import STORED, BlockSpec
from cluscomp_jax.plan.shapes import nbytes, with_shardings
from cluscomp_jax.training import (
    Sharding,
    TrainState,
    evaluate_step,
    init_state,
    round_masters,
    split_shapes,
    state_places,
    train_step,
)

STAGE = "finetune"


def finetuning(
    settings: Sequence[BlockSpec], cfg: FinetuneConfig, sharding: Sharding | None = None
) -> Iterator[Program]:
    """Yields the first state, a step, and the two programs of an evaluation; how many of those there are is not known.

    Args:
      settings: the kinds of blocks, together all of the model.
      cfg: the finetuning; its model is not read.
      sharding: on several devices, of which bytes are then those of one; None: on the device of the settings.

    Raises:
      InputError: a teacher is followed, of which the settings know nothing.
    """
    if cfg.training.distillation is not None:
        raise InputError(
            "finetuning with a teacher is not planned; leave out [training.distillation] here, and add the teacher's "
            "parameters and one forward pass to the finetune stage"
        )
    training, model, place = cfg.training, settings[0].model, settings[0].place
    members = {i: setting for setting in settings for i in setting.members}
    blocks = (members[i].compressed() for i in range(model.num_blocks))
    outer = place.tree(model.outer_shapes(), STORED)
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
    yield Program(STAGE, "start", traced, nbytes((trained, frozen)))
    state = TrainState(*traced.out_info)
    if sharding is None:
        state = place.like(state)
    else:
        state = with_shardings(state, state_places(state, settings=training, sharding=sharding))
    held = nbytes((state, frozen))
    traced = round_masters.trace(trained, layout=layout)
    yield Program(STAGE, "round", traced, held, 0)
    batch = rows(training.batch_size, cfg.data.length)
    fixed = {"layout": layout, "settings": training}
    # Rounded masters are new arrays, which lie as the masters do.
    traced = evaluate_step.trace(trained, frozen, *batch, **fixed)
    yield Program(STAGE, "score", traced, held + nbytes((trained, batch)), 0)
    batches = rows(training.grad_accumulation_steps, training.batch_size, cfg.data.length)
    traced = train_step.trace(state, frozen, *batches, **fixed)
    best = nbytes(trained) if cfg.result == "best" else 0
    yield Program(STAGE, "step", traced, held + best + nbytes(batches), training.steps)
