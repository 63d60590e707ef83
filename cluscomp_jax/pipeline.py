"""The pipeline: parameters, or a source of blocks, compressed block by block (`cluscomp_jax.compression_run`).

Sees a Model, a ParamSource and a sink; knows no file format.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.run_records import RunRecords
from cluscomp_jax.clustering.matrix import size_report
from cluscomp_jax.clustering.resolve import check_stacked, samples_of
from cluscomp_jax.clustering.summary import CompressionSummary
from cluscomp_jax.compression_run import compress_all, prepare
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core.caller_mesh import without_mesh
from cluscomp_jax.models import layouts
from cluscomp_jax.models.calibration import Calibration, digest_of
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.source import BlockSink, DictSink, DictSource, Fingerprint, ParamSource, run_fingerprint
from cluscomp_jax.plan.host import scratch_bytes
from cluscomp_jax.recovery import recover_stream, recovery_rows
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.runtime.scratch import scratch_folder
from cluscomp_jax.runtime.timing import StageTimer


def compress(
    params: Any,
    cfg: CompressConfig,
    *,
    calibration: Calibration | None = None,
    reporter: Reporter | None = None,
    work_dir: str | Path | None = None,
    layout: layouts.Layouts = layouts.auto,
    check: layouts.ApplyFn | None = None,
) -> Any:
    """Returns the compressed params: the same tree, its matched kernels CodebookArrays.

    Of the FlaxLlama layout, or of a ParamSource, it is a nested dict with string keys, and all arrays are on the host.
    In any other layout, or with a `layout` named, what is not compressed or tuned stays as it is, and a CodebookArray
    has the shape and dtype of the host's kernel.

    Args:
      params: a nested dict in the FlaxLlama layout (string or integer layer keys), a ParamSource, or any pytree
        of one of the codebases of `layout`, boxed or not.
      cfg: the run; `cfg.model` is the family's config (`LlamaConfig.of` reads those of other libraries).
      calibration: tokens int [samples, length], or `Embeddings`, or floating [samples, t, d], which are embeddings
        without padding and tokens; with them clustering is activation-weighted, blocks are tuned and, of tokens, the
        whole follows the original (where cfg says so), without them matrices are only clustered.
      reporter: is told of progress; silent by default.
      work_dir: an existing folder; up to three streams of activations lie in a temporary one inside it meanwhile
        (`plan.host.scratch_bytes`). None: the system's folder for temporary files.
      layout: the codebases whose names are tried (`cluscomp_jax.layouts`); auto: all that are known.
      check: check(params, tokens int32 [b, t]) -> logits [b, t, vocab], the host's own forward pass. It is compared
        with ours before any work: names and shapes do not show a transposed square kernel or another rope.

    Raises:
      InputError: whatever does not fit, before any long work; also activations on the disk.
    """
    calibration = None if calibration is None else samples_of(calibration)
    opened = layouts.open_tree(params, build_model(cfg.model), layout)
    model, cfg = opened.model, dataclasses.replace(cfg, model=opened.model)
    if opened.stacked:
        check_stacked(model, cfg, calibration)
    rows = recovery_rows(model, cfg, calibration)
    if check is not None:
        layouts.check_forward(params, opened, check)
    sink = DictSink()
    needed = 0 if calibration is None or len(calibration.shape) != 2 else scratch_bytes(model, cfg, calibration.shape)
    with scratch_folder(work_dir, needed) as folder, without_mesh():
        summary = compress_stream(
            opened.source,
            sink,
            cfg,
            calibration=calibration,
            work_dir=folder,
            reporter=reporter,
            may_grow=False,
            alike=opened.stacked,
        )
        if rows is not None:
            clustered, sink = DictSource(sink.params(model), model), DictSink()
            bits = summary.bits_per_weight
            recover_stream(clustered, opened.source, sink, cfg, rows, bits=bits, reporter=reporter)
    return opened.put_back(sink.params(model))


def compress_stream(
    source: ParamSource,
    sink: BlockSink,
    cfg: CompressConfig,
    *,
    calibration: Calibration | None,
    work_dir: Path,
    reporter: Reporter | None = None,
    finished_blocks: int = 0,
    owns_process: bool = False,
    may_grow: bool = True,
    alike: bool = False,
) -> CompressionSummary:
    """Compresses block after block from `source` into `sink` and returns what was done; `cfg.recovery` is not.

    Args:
      calibration: tokens int [samples, length], packed embeddings, or None.
      work_dir: scratch for the activation streams and the records of finished blocks. A run that is resumed must
        get the same folder.
      finished_blocks: blocks already in the sink. Their activations are recomputed, not read from scratch files,
        so that an interrupted run gives the bytes of an uninterrupted one.
      owns_process: as for StageTimer: whether freed memory may be given back and the peak of each stage measured.
      may_grow: whether codebooks may be larger than the matrices that they replace; the command line warns of it.
      alike: whether a bit budget gives all blocks the same settings, because they are stacked in arrays.

    Raises:
      InputError: whatever does not fit, before any long work.
    """
    timer, reporter = StageTimer(owns_process=owns_process), reporter or SilentReporter()
    records, count = RunRecords(work_dir / "records"), build_model(cfg.model).num_blocks
    if finished_blocks < count:
        run = prepare(source, cfg, calibration, work_dir, records, timer, reporter, may_grow, alike)
        compress_all(run, source, sink, records, finished_blocks)
        if run.streams is not None:
            run.streams.delete()
    else:
        for i in range(count):
            records.report(i, reporter)
    blocks = [records.block(i) for i in range(count)]
    with timer("load"):
        outer = source.load_outer()
    with timer("store"):
        sink.store_outer(outer)
    matrices = tuple(matrix for record in blocks for matrix in record.pop("matrices"))
    weights = sum(math.prod(matrix["shape"]) for matrix in matrices)
    bits = sum(matrix["bits"] for matrix in matrices)
    total_bytes = sum(record["total_bytes"] for record in blocks) + size_report(outer).total_bytes
    return CompressionSummary(matrices, tuple(blocks), timer.to_dict(), bits / weights, total_bytes)


def fingerprint(source: ParamSource, cfg: CompressConfig, calibration: Calibration | None) -> Fingerprint:
    """Returns everything the result's bytes depend on."""
    return run_fingerprint(source, cfg.to_dict(), cfg.model, calibration=digest_of(calibration))
