"""The recovery stage of a compression: finetuning of the compressed blocks, with the original as teacher."""

import dataclasses
from pathlib import Path

import numpy as np

from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.finetuning import FinetuneSummary, TeacherSource, finetune_stream
from cluscomp_jax.models.calibration import Calibration, Embeddings
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.source import BlockSink, ParamSource
from cluscomp_jax.runtime.reporter import Reporter


def recover_stream(
    compressed: ParamSource,
    original: ParamSource,
    sink: BlockSink,
    cfg: CompressConfig,
    rows: np.ndarray,
    *,
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
      rows: tokens int [n, t] to compare the two on.
      state_dir: a folder for saved states; with one, the same call resumes after an interruption.
      reporter: of progress.
      finished_blocks: blocks that the sink has already.

    Raises:
      InputError: whatever does not fit.
      DivergedError: a loss or gradient was not finite; the state before that step is saved.
    """
    assert cfg.recovery is not None
    model = build_model(cfg.model)
    settings = dataclasses.replace(cfg.recovery.finetune_config(), model=cfg.model, mesh=cfg.mesh, seed=cfg.seed)
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


def recovery_rows(cfg: CompressConfig, calibration: Calibration | None) -> np.ndarray | None:
    """Returns the tokens that the recovery stage of a run takes; None: it has no such stage.

    Raises:
      InputError: there are no calibration samples, or they are no tokens.
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
    return calibration
