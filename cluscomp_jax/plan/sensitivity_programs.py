"""The programs that measure what an error of each kernel costs: `cluscomp_jax.clustering.sensitivity`."""

from collections.abc import Iterator, Sequence
from typing import Any

from cluscomp_jax.clustering import error_feedback, hessian, sensitivity
from cluscomp_jax.models.model import run_block, run_embed, width
from cluscomp_jax.models.streams import Batch
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import STORED, BlockSpec
from cluscomp_jax.plan.shapes import nbytes

STAGE = "sensitivity"


def measuring(settings: Sequence[BlockSpec]) -> Iterator[Program]:
    """Yields one pass forward and one backward over single samples, where a budget is spent by sensitivities.

    Args:
      settings: the kinds of blocks, together all of the model.
    """
    setting = settings[0]
    if not setting.cfg.cluster.uneven:
        return
    samples = min(setting.cfg.calibration.samples, sensitivity.SAMPLES)
    model, place, length = setting.model, setting.place, setting.cfg.calibration.length
    outer, tokens = place.tree(model.outer_shapes(), STORED), place.array(1, length, dtype="int32")
    x = place.array(1, length, width(model))
    traced = run_embed.trace(outer, tokens, model=model, dtype=x.dtype)
    yield Program(STAGE, "embed", traced, nbytes((outer, tokens)), samples)
    for each in settings:
        yield from _forward(each, nbytes(outer), x, samples)
    traced = sensitivity.head_slope.trace(outer, x, tokens, model=model)
    slopes = samples * nbytes(x)
    yield Program(STAGE, "head", traced, nbytes((outer, tokens, x)) + slopes, samples)
    for each in settings:
        block = place.tree(each.shapes, x.dtype)
        traced = sensitivity.block_slope.trace(block, x, x, model=model, layer_type=each.layer_type)
        yield Program(STAGE, "block backward", traced, nbytes((block, x)) + slopes, samples * each.blocks)


def _forward(setting: BlockSpec, held: int, x: Any, samples: int) -> Iterator[Program]:
    """Yields the pass of single samples through a block, and their Hessians; `held`: bytes of the outer parameters."""
    place, fixed = setting.place, {"model": setting.model, "layer_type": setting.layer_type}
    block = place.tree(setting.shapes, "float32")
    live = held + nbytes((block, x, x, x))  # of samples, one is on its way in and one on its way out
    traced = run_block.trace(block, x, **fixed)
    yield Program(STAGE, "block", traced, live, samples * setting.blocks)
    if not setting.cfg.cluster.error_feedback:
        return
    model = setting.model
    for independent in model.independent_groups:
        for groups in hessian.together(model, setting.shapes, independent, drift=False):
            add, of_groups = hessian.add_products, {**fixed, "groups": groups, "block": block}
            sums = place.like(add.trace(None, Batch(x), **of_groups).out_info)
            held, calls = live + nbytes(sums), len(groups) * setting.blocks
            traced = add.trace(sums, Batch(x), **of_groups)
            yield Program(STAGE, f"Hessian of {groups[0]}", traced, held, samples * setting.blocks)
            traced = hessian.divide.trace(sums, place.array(dtype="int32"))
            yield Program(STAGE, f"means of {groups[0]}", traced, held, setting.blocks)
            (one,) = sums[groups[0]]["hessian"]  # activations are float32 here
            traced = error_feedback.factor_damped.trace(one, place.array(), place.array())
            yield Program(STAGE, "root", traced, held, calls)
            factor = place.like(traced.out_info)
            traced = error_feedback.is_root.trace(factor.root)
            yield Program(STAGE, "root found", traced, held + nbytes(factor), calls)
            traced = sensitivity.share_left.trace(one, factor)
            yield Program(STAGE, "share", traced, held + nbytes(factor), calls)
