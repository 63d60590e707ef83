"""The programs of finetuning a compressed model, as `finetune` calls them, and what it holds beside them."""

from collections.abc import Iterator, Sequence

from cluscomp_jax.finetune_config import FinetuneConfig
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import STORED, Setting
from cluscomp_jax.plan.shapes import nbytes
from cluscomp_jax.training import evaluate_step, init_state, round_masters, split_shapes, train_step

STAGE = "finetune"


def finetuning(settings: Sequence[Setting], cfg: FinetuneConfig) -> Iterator[Program]:
    """Yields the first state, a step, and the two programs of an evaluation; how many of those there are is not known.

    Args:
      settings: the kinds of blocks, together all of the model.
      cfg: the finetuning; its model is not read.
    """
    training, model, place = cfg.training, settings[0].model, settings[0].place
    members = {i: setting for setting in settings for i in setting.members}
    blocks = (members[i].compressed() for i in range(model.num_blocks))
    rest = place.tree(model.rest_shapes(), STORED)
    masters, still, layout = split_shapes(blocks, rest, model, training.trainable)
    trained, frozen = place.like(masters), place.like(still)
    traced = init_state.trace(trained, settings=training)
    yield Program(STAGE, "start", traced, nbytes((trained, frozen)))
    state = place.like(traced.out_info)
    rows = (training.batch_size, cfg.data.length)
    held = nbytes((state, frozen))
    traced = round_masters.trace(trained, layout=layout)
    yield Program(STAGE, "round", traced, held, 0)
    stored = place.like(traced.out_info)
    tokens, scored = place.array(*rows, dtype="int32"), place.array(*rows, dtype="bool")
    fixed = {"layout": layout, "settings": training}
    traced = evaluate_step.trace(stored, frozen, tokens, scored, **fixed)
    yield Program(STAGE, "score", traced, held + nbytes((stored, tokens, scored)), 0)
    batches = (training.accumulation, *rows)
    tokens, scored = place.array(*batches, dtype="int32"), place.array(*batches, dtype="bool")
    traced = train_step.trace(state, frozen, tokens, scored, **fixed)
    yield Program(STAGE, "step", traced, held + nbytes((tokens, scored)), training.steps)
