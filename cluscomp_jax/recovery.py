"""The recovery stage of a compression: finetuning of the compressed blocks, with the original as teacher."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluscomp_jax.clustering.resolve import Rules, rules_by_block
from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.finetuning import FinetuneSummary, TeacherSource, check_context, finetune_stream
from cluscomp_jax.inference.continuations import continue_rows
from cluscomp_jax.models.calibration import Calibration, Embeddings
from cluscomp_jax.models.model import Model, build_model
from cluscomp_jax.models.source import BlockSink, ParamSource
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.training import refuse_unmatched


def recover_stream(
    compressed: ParamSource,
    original: ParamSource,
    sink: BlockSink,
    cfg: CompressConfig,
    rows: np.ndarray,
    *,
    bits: float,
    state_dir: Path | None = None,
    reporter: Reporter | None = None,
    finished_blocks: int = 0,
) -> FinetuneSummary:
    """Trains `compressed` to follow `original`, as `cfg.recovery` says, into `sink`.

    Args:
      compressed: the blocks as clustering and tuning left them, and the parameters outside them.
      original: the model that they are made of; it stays on the device.
      sink: takes every block, and the parameters outside the blocks.
      cfg: the run; `cfg.recovery` is set.
      rows: tokens int [n, t] to compare the two on, and to be continued by the original where it generates samples. A
        run that is resumed generates them anew.
      bits: stored bits per weight of `compressed`.
      state_dir: a folder for saved states; with one, the same call resumes after an interruption.
      reporter: of progress.
      finished_blocks: blocks that the sink has already.

    Raises:
      InputError: whatever does not fit.
      DivergedError: a loss or gradient was not finite; the state before that step is saved.
    """
    assert cfg.recovery is not None
    model = build_model(cfg.model)
    settings = cfg.recovery.finetune_config(cfg.mesh, bits=bits)
    settings = dataclasses.replace(settings, model=cfg.model, seed=cfg.seed)
    reporter = reporter or SilentReporter()
    if cfg.recovery.generated_samples:
        written = continue_rows(
            original,
            model,
            rows,
            cfg.recovery.generated_samples,
            seed=cfg.seed,
            dtype=compute_dtype_of(settings.training),
            reporter=reporter,
        )
        rows = np.concatenate([rows, written])
    return finetune_stream(
        compressed,
        sink,
        rows,
        settings,
        teacher=TeacherSource(original, model),
        state_dir=state_dir,
        reporter=reporter,
        finished_blocks=finished_blocks,
    )


def recovery_rows(model: Model, cfg: CompressConfig, calibration: Calibration | None) -> np.ndarray | None:
    """Returns the tokens that the recovery stage of a run takes; None: it has no such stage.

    Called before the blocks are compressed, so that what recovery would refuse is refused before any long work.

    Args:
      model: the decoder.
      cfg: the run.
      calibration: its samples.

    Raises:
      InputError: there are no calibration samples, they are no tokens or exceed the model's context, or a pattern of
        `cfg.recovery.trainable` matches nothing.
    """
    if cfg.recovery is None:
        return None
    if calibration is None:
        raise InputError(
            f"recovery takes {cfg.recovery.steps} steps over the calibration samples, and there are none; give "
            "calibration tokens, or leave recovery out"
        )
    if isinstance(calibration, Embeddings):
        raise InputError(
            f"recovery takes {cfg.recovery.steps} steps over calibration tokens, and the samples are embeddings; leave "
            "recovery out, and finetune on a text afterwards"
        )
    check_context(calibration.shape[1], model, "recovery: calibration samples")
    _check_trainable(model, cfg.recovery.trainable, rules_by_block(model, cfg))
    return calibration


def _check_trainable(model: Model, trainable: Sequence[str], by_block: Sequence[Rules]) -> None:
    names = set(model.outer_shapes())
    for i, rules in enumerate(by_block):
        prefix = f"{model.blocks_path}/{i}"
        names |= {
            f"{prefix}/{path}/codebook" if path in rules else f"{prefix}/{path}" for path in model.block_shapes(i)
        }
    refuse_unmatched(trainable, names, "recovery: trainable")
