"""The programs that need more of a model than a block: embedding, evaluation, generation."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.recovery import RecoveryConfig
from cluscomp_jax.evaluation import perplexity
from cluscomp_jax.inference import continuations, decoder, ragged
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.models.model import run_block, run_embed, width
from cluscomp_jax.plan.block_programs import decoding
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import STORED, BlockSpec
from cluscomp_jax.plan.shapes import nbytes


def embedding(setting: BlockSpec) -> Iterator[Program]:
    """Yields the embedding of calibration tokens."""
    outer = setting.place.tree(setting.model.outer_shapes(), STORED)
    tokens = setting.place.array(1, setting.cfg.calibration.length, dtype="int32")
    traced = run_embed.trace(outer, tokens, model=setting.model, dtype=setting.compute)
    yield Program("embed", "embed", traced, nbytes((outer, tokens)), setting.cfg.calibration.samples)


def evaluation(setting: BlockSpec) -> Iterator[Program]:
    """Yields the perplexity of one window of `calibration.length`, in the dtype of tuning, of compressed blocks."""
    outer = setting.place.tree(setting.model.outer_shapes(), STORED)
    block, x = setting.decoded(), setting.activations(1)
    yield from decoding(setting, "evaluate", nbytes(outer))
    traced = run_block.trace(block, x, model=setting.model, layer_type=setting.layer_type)
    yield Program("evaluate", "block", traced, nbytes((outer, block, x, x, x)), setting.blocks)
    length = min(perplexity.HEAD_TOKENS, setting.cfg.calibration.length - 1)
    part = setting.place.array(1, length, x.shape[-1], dtype=x.dtype)
    wanted = setting.place.array(1, length, dtype="int32")
    traced = perplexity.head_losses.trace(outer, part, wanted, model=setting.model)
    yield Program("evaluate", "head", traced, nbytes((outer, part, wanted)), x.shape[1] / length)


def continuing(settings: Sequence[BlockSpec], recovery: RecoveryConfig, stage: str) -> Iterator[Program]:
    """Yields the programs by which the original continues calibration samples, where recovery has such samples.

    Args:
      settings: the kinds of blocks, together all of the model.
      recovery: how many samples.
      stage: what the programs are said to belong to.
    """
    if not recovery.generated_samples:
        return
    setting = settings[0]
    model, place, length = setting.model, setting.place, setting.cfg.calibration.length
    dtype = jnp.dtype(compute_dtype_of(recovery.finetune_config().training))
    (batch, batches), begin = continuations.batches_of(recovery.generated_samples), continuations.prompt_length(length)
    prompt = decoder.prompt_width(begin)
    outer = place.tree(model.outer_shapes(), dtype)
    init = partial(model.init_cache, 0, batch, decoder.cache_length(begin, length - begin), dtype)
    cache = place.like(jax.eval_shape(init))
    blocks = [place.tree(each.shapes, dtype) for each in settings]
    whole = nbytes(outer) + sum(
        each.blocks * nbytes((block, cache)) for each, block in zip(settings, blocks, strict=True)
    )
    last = place.array(batch, 1, width(model), dtype=dtype)
    for name, columns, first, calls in (
        ("prompt", prompt, None, 1),
        ("token", 1, 0, length - begin),
    ):
        tokens = place.array(batch, columns, dtype="int32")
        traced = decoder.embed_tokens.trace(model, dtype, outer, tokens, 0)
        yield Program(stage, f"{name}: embed", traced, whole + nbytes((tokens, last)), calls * batches)
        x = place.like(traced.out_info)
        held = whole + nbytes((tokens, x, last))
        for each, block in zip(settings, blocks, strict=True):
            traced = decoder.cached_block.trace(model, each.layer_type, block, x, cache, first, length)
            yield Program(stage, f"{name}: block", traced, held, calls * batches * each.blocks)
    x = place.array(batch, prompt, width(model), dtype=dtype)
    traced = ragged.gather_last.trace(last, x, place.array(batch, dtype="int32"))
    yield Program(stage, "prompt: last", traced, whole + nbytes(traced.in_avals), batches)
    traced = decoder.next_token.trace(model, continuations.SAMPLING, outer, last, 0, 0, place.key())
    yield Program(stage, "token: head", traced, whole + nbytes(last), (length - begin) * batches)


def generating(settings: Sequence[BlockSpec], *, context: int) -> Iterator[Program]:
    """Yields the prefill and the steps of one sequence that fills `context`, matrices decoded at every step.

    Args:
      settings: the kinds of blocks, together all of the model.
      context: positions of the cache; the prompt is half of them.
    """
    setting = settings[0]
    model, place = setting.model, setting.place
    outer = place.tree(model.outer_shapes(), setting.compute)
    init = partial(model.init_cache, 0, 1, context, setting.compute)
    cache = place.like(jax.eval_shape(init))
    whole = nbytes(outer) + sum(each.blocks * nbytes((each.compressed(), cache)) for each in settings)
    prompt = decoder.prompt_width(context // 2)
    for name, columns, begin, calls in (("prompt", prompt, None, 1.0), ("token", 1, 0, context / 2)):
        tokens = place.array(1, columns, dtype="int32")
        traced = decoder.embed_tokens.trace(model, setting.compute, outer, tokens, 0)
        x = place.like(traced.out_info)
        for each in settings:
            block = each.compressed()
            traced = decoder.cached_block.trace(model, each.layer_type, block, x, cache, begin, context)
            yield Program("generate", f"{name}: block", traced, whole + nbytes((tokens, x)), calls * each.blocks)
        traced = decoder.next_token.trace(model, Sampling(), outer, x, 0, 0, place.key())
        yield Program("generate", f"{name}: head", traced, whole + nbytes((tokens, x)), calls)
