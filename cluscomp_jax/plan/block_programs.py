"""The other programs of a block: its forward passes, and its tuning."""

from collections.abc import Iterator

from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode_arrays
from cluscomp_jax.models.model import run_block
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import BlockSpec
from cluscomp_jax.plan.shapes import nbytes
from cluscomp_jax.tuning import blockwise


def targets(setting: BlockSpec) -> Iterator[Program]:
    """Yields the passes through the original block, less that whose outputs `Streams.token_weights` keeps."""
    stores = setting.cfg.activation_stores
    if "original" not in stores or "upcoming" in stores:
        return
    dense, x = setting.dense(), setting.activations(setting.batch)
    traced = run_block.trace(dense, x, model=setting.model, layer_type=setting.layer_type)
    # One batch is on its way in and one on its way out.
    yield Program("targets", "block", traced, nbytes((dense, x, x, x)), setting.passes)


def propagation(setting: BlockSpec) -> Iterator[Program]:
    """Yields the pass of the compressed stream through the compressed block, its kernels decoded."""
    yield from decoding(setting, "propagate", 0)
    block, x = setting.decoded(), setting.activations(setting.batch)
    traced = run_block.trace(block, x, model=setting.model, layer_type=setting.layer_type)
    yield Program("propagate", "block", traced, nbytes((block, x, x, x)), setting.passes)


def decoding(setting: BlockSpec, stage: str, live: int) -> Iterator[Program]:
    """Yields the decoding of a block's kernels one by one, with `live` bytes held."""
    for _, leaf in sorted(trees.flatten(setting.compressed()).items()):
        if isinstance(leaf, CodebookArray):
            traced = decode_arrays.trace(leaf.codebook, leaf.index, form=leaf.form, coding=leaf.coding)
            yield Program(stage, "decode", traced, live + nbytes(leaf), setting.blocks)
            live += nbytes(setting.place.like(traced.out_info))


def tuning(setting: BlockSpec) -> Iterator[Program]:
    """Yields the tuning of one block: the first state, a step, a score."""
    settings = setting.cfg.tuning
    if settings is None:
        return
    block = setting.compressed(tuned=False)
    trained, frozen = blockwise.split_trainable(block, norms=settings.norms)
    samples = setting.cfg.calibration.samples - settings.validation_samples
    steps = settings.epochs * (samples // settings.batch_size)
    total_steps = max(steps, 1)
    fixed = {"model": setting.model, "layer_type": setting.layer_type, "settings": settings}
    traced = blockwise.init_state.trace(trained, settings=settings, total_steps=total_steps)
    norms = {path: leaf for path, leaf in frozen.items() if path in trained and not isinstance(leaf, CodebookArray)}
    live = nbytes((trained, frozen)) - nbytes(norms)  # those are in both
    yield Program("tune", "start", traced, live, setting.blocks)
    state = setting.place.like(traced.out_info)
    copies = 2 if settings.validation_samples else 1
    live += nbytes(state) + copies * nbytes(state.trained)
    x = setting.activations(settings.batch_size, settings.activation_dtype)
    live += nbytes((x, x))
    traced = blockwise.evaluate_block.trace(state.trained, frozen, x, x, **fixed)
    scores = samples // settings.batch_size + (settings.epochs + 1) * settings.validation_samples / settings.batch_size
    yield Program("tune", "score", traced, live, setting.blocks * scores)
    traced = blockwise.tuning_step.trace(state, frozen, x, x, total_steps=total_steps, **fixed)
    # In addition to the batch of a step the device holds the one of the step before, or of the next.
    yield Program("tune", "step", traced, live + nbytes((x, x)), setting.blocks * steps)
