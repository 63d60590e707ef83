"""The pipeline, one block at a time: load -> statistics -> cluster -> tune -> propagate -> store.

Sees a Model, a ParamSource and a sink; knows no file format. Device memory holds one block and a few batches.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.checkpoint.run_records import RunRecords
from cluscomp_jax.clustering.block import cluster_block
from cluscomp_jax.clustering.matrix import decompress, size_report
from cluscomp_jax.clustering.resolve import (
    Rules,
    bits_per_weight,
    check_calibration,
    check_stacked,
    mixes,
    refuse_growth,
    rules_by_block,
    samples_of,
)
from cluscomp_jax.clustering.sensitivity import sensitivities
from cluscomp_jax.clustering.summary import CompressionSummary
from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.caller_mesh import without_mesh
from cluscomp_jax.core.codebook import CodebookArray, round_codebook
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models import layouts
from cluscomp_jax.models.calibration import Calibration, Embeddings, digest_of, first_samples
from cluscomp_jax.models.model import Model, build_model, run_block
from cluscomp_jax.models.prefetch import BlockReader, BlockWriter
from cluscomp_jax.models.sharding import Sharding, make_sharding, put_whole
from cluscomp_jax.models.source import BlockSink, DictSink, DictSource, Fingerprint, ParamSource, run_fingerprint
from cluscomp_jax.models.streams import Streams, embed_streams, write_streams
from cluscomp_jax.plan.budget import forward_batch
from cluscomp_jax.plan.host import scratch_bytes
from cluscomp_jax.recovery import recover_stream, recovery_rows
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.runtime.scratch import scratch_folder
from cluscomp_jax.runtime.timing import StageTimer
from cluscomp_jax.tuning import BlockTuning, split_trainable, tune_block


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
      work_dir: an existing folder; up to four streams of activations lie in a temporary one inside it meanwhile
        (`plan.host.scratch_bytes`). None: the system's folder for temporary files.
      layout: the codebases whose names are tried (`cluscomp_jax.layouts`); auto: all that are known.
      check: check(params, tokens int32 [b, t]) -> logits [b, t, vocab], the host's own forward pass. It is compared
        with ours before any work: names and shapes do not show a transposed square kernel or another rope.

    Raises:
      InputError: whatever does not fit, before any long work; also activations on the disk.
    """
    calibration = None if calibration is None else samples_of(calibration)
    rows = recovery_rows(cfg, calibration)
    opened = layouts.open_tree(params, build_model(cfg.model), layout)
    model, cfg = opened.model, dataclasses.replace(cfg, model=opened.model)
    if opened.stacked:
        check_stacked(model, cfg, calibration)
    if check is not None:
        layouts.check_forward(params, opened, check)
    sink = DictSink()
    needed = 0 if calibration is None or len(calibration.shape) != 2 else scratch_bytes(model, cfg, calibration.shape)
    with scratch_folder(work_dir, needed) as folder, without_mesh():
        compress_stream(
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
            recover_stream(clustered, opened.source, sink, cfg, rows, reporter=reporter)
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
        _compress_blocks(run, source, sink, records, finished_blocks)
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


@dataclasses.dataclass(frozen=True)
class Run:
    """What every block of a run is compressed with.

    Attributes:
      model: the decoder.
      cfg: the settings.
      rules: per block, {block-relative path: rule}.
      tuning: how blocks are tuned; None: they are not.
      streams: inputs of the next block; None: no stage looks at activations.
      sharding: of the devices that share the samples of a batch; None: there is one.
      timer: of the stages.
      reporter: of progress.
    """

    model: Model
    cfg: CompressConfig
    rules: list[Rules]
    tuning: BlockTuningConfig | None
    streams: Streams | None
    sharding: Sharding | None
    timer: StageTimer
    reporter: Reporter

    def step(self, params: Params, i: int) -> Callable[[jax.Array], jax.Array]:
        """Returns block i with these parameters, placed on the devices, as a function of its input."""
        there = put_whole(params, self.sharding)
        return partial(run_block, there, model=self.model, layer_type=self.model.layer_type(i))


def prepare(
    source: ParamSource,
    cfg: CompressConfig,
    calibration: Calibration | None,
    work_dir: Path,
    records: RunRecords,
    timer: StageTimer,
    reporter: Reporter,
    may_grow: bool = True,
    alike: bool = False,
) -> Run:
    """Returns the run at its first block: settings resolved and checked, sensitivities measured, samples embedded.

    Raises:
      InputError: whatever does not fit.
    """
    model = build_model(cfg.model)
    rules = rules_by_block(model, cfg, alike=alike)
    sharding = make_sharding(cfg.mesh, model)
    if calibration is not None:
        check_calibration(model, cfg, calibration, rules)
    if not may_grow:
        refuse_growth(bits_per_weight(model, cfg, rules))
    if calibration is None:
        return Run(model, cfg, rules, None, None, sharding, timer, reporter)
    shape = (calibration.shape[0], calibration.shape[1])
    kept_out = 0 if cfg.tuning is None else cfg.tuning.validation_samples
    if not alike and mixes(cfg, calibration):

        def measure() -> dict[str, float]:
            with timer("sensitivity"):
                judged = first_samples(calibration, shape[0] - kept_out)
                return sensitivities(model, source, judged, settings=cfg.cluster, work_dir=work_dir, reporter=reporter)

        rules = rules_by_block(model, cfg, records.sensitivities(measure))
    streams = None
    if cfg.cluster.calibrated or cfg.tuning:
        numbers = cfg.tuning or BlockTuningConfig()
        # Of as many samples as can be spread, so that only the last batch may be whole on every device.
        spread = max(1, shape[0] // cfg.mesh.data)
        original = cfg.tuning is not None or cfg.cluster.corrects
        options = {
            "original": original,
            "upcoming": original and cfg.cluster.weighs_positions,
            "augmented": cfg.tuning is not None and cfg.tuning.aug_loss,
            "batch_size": cfg.mesh.data * min(spread, forward_batch(model, cfg, shape)),
            "dtype": jnp.dtype(compute_dtype_of(numbers)),
            "sharding": sharding,
            "validation_samples": kept_out,
        }
        stored = jnp.dtype(numbers.activation_dtype)
        with timer("embed"):
            if isinstance(calibration, Embeddings):
                streams = write_streams(calibration, work_dir, stored, **options)
            else:
                streams = embed_streams(model, source.load_outer(), calibration, work_dir, stored, **options)
    return Run(model, cfg, rules, cfg.tuning, streams, sharding, timer, reporter)


def _compress_blocks(run: Run, source: ParamSource, sink: BlockSink, records: RunRecords, finished: int) -> None:
    """Compresses all blocks but the first `finished`, which the sink has, and stores the record of each."""

    def store(i: int, block: Params, record: dict[str, Any]) -> None:
        records.store(i, record)
        sink.store_block(i, block)

    for i in range(finished):
        records.report(i, run.reporter)
    count, first = run.model.num_blocks, 0 if run.streams is not None else finished
    with BlockReader(source, count, run.timer, first) as reader, BlockWriter(run.timer) as writer:
        for i in range(first, count):
            if i < finished:
                _resume_block(run, i, reader, sink)
                continue
            block, record = compress_block(run, i, reader)
            with run.timer("store"):
                writer.wait()
            if i > finished:
                records.report(i - 1, run.reporter)
            writer.put(partial(store, i, block, record))
            del block
        with run.timer("store"):
            writer.wait()
    records.report(count - 1, run.reporter)


def _resume_block(run: Run, i: int, reader: BlockReader, sink: BlockSink) -> None:
    """Moves the streams past a block that an earlier process finished."""
    with run.timer("load"):
        dense = reader.take(i)
    with run.timer("resume"):
        _pass_original(run, i, dense)
        del dense
        reader.read_next()
        _pass_compressed(run, i, sink.load_block(i))


def compress_block(run: Run, i: int, reader: BlockReader) -> tuple[Params, dict[str, Any]]:
    """Returns (block i compressed, on the host; its record), and moves the streams past it.

    What the next stage does not need is deleted from the device before it, whose peak it would add to.
    """
    with run.timer("load"):
        dense = reader.take(i)
    if run.tuning is None:
        reader.read_next()  # reading overlaps with the longest stage, which is clustering
    began = time.monotonic()
    if run.streams is not None and run.cfg.cluster.calibrated:
        dense = jax.device_get(jax.device_put(dense))  # laid out as the device has it: it goes there several times
    block, matrices = cluster_block(
        run.model,
        i,
        dense,
        run.rules[i],
        run.streams,
        run.cfg.cluster,
        seed=run.cfg.seed,
        timer=run.timer,
        reporter=run.reporter,
        sharding=run.sharding,
    )
    block = jax.device_get(block)
    run.timer.release()
    if run.tuning is not None or i + 1 < run.model.num_blocks:
        _pass_original(run, i, dense, kept=run.streams is not None and run.streams.upcoming is not None)
    del dense
    run.timer.release()
    reader.read_next()
    record: dict[str, Any] = {"index": i}
    trained: Collection[str] = ()
    if run.tuning is not None and matrices:
        trained = set(split_trainable(block, norms=run.tuning.norms)[0])
        before = _codebook_dtypes(block)
        block, tuned = _tune(run, i, block)
        record |= dataclasses.asdict(tuned)
    block = jax.device_get(_rounded(block, trained, run.cfg.cluster.codebook_dtype))
    if trained:
        _warn_of_dtypes(run, i, before, block)
    run.timer.release()
    if i + 1 < run.model.num_blocks or run.tuning is not None:
        record |= _pass_compressed(run, i, block)
    size = size_report(block)
    record |= {"seconds": time.monotonic() - began, "total_bytes": size.total_bytes, "matrices": matrices}
    return block, record


def _tune(run: Run, i: int, block: Params) -> tuple[Params, BlockTuning]:
    assert run.tuning is not None
    assert run.streams is not None
    assert run.streams.original is not None
    train = len(run.streams.compressed) - run.tuning.validation_samples
    steps = run.tuning.epochs * (train // run.tuning.batch_size)
    run.reporter.start(f"block {i + 1}/{run.model.num_blocks}: tune", steps, "steps")
    augmented = () if run.streams.augmented is None else (run.streams.augmented,)
    with run.timer("tune"):
        tuned, result = tune_block(
            run.model,
            run.model.layer_type(i),
            block,
            run.streams.compressed,
            (run.streams.original, *augmented),
            run.tuning,
            rng=np.random.default_rng((run.cfg.seed, i)),
            reporter=run.reporter,
            sharding=run.sharding,
            weights=run.streams.weights,
        )
    if result.diverged:
        run.reporter.warn(
            f"block {i}: loss or gradient was not finite at epoch {len(result.epoch_losses)}; "
            "the last good codebooks are kept"
        )
    return tuned, result


def _pass_original(run: Run, i: int, dense: Params, *, kept: bool = False) -> None:
    """Moves the original stream past block i, if there is one, to outputs that are `kept` or that it computes."""
    if (streams := run.streams) is None or streams.original is None:
        return
    with run.timer("targets"):
        if streams.augmented is not None:
            streams.pass_augmented(run.step(dense, i))
        streams.pass_original(None if kept else run.step(dense, i))


def _pass_compressed(run: Run, i: int, block: Params) -> dict[str, float]:
    """Moves the compressed stream past block i; returns its error against the original stream there."""
    if run.streams is None:
        return {}
    with run.timer("propagate"):
        # Decoded first, so that one program serves all blocks, however finely each is cut.
        run.streams.pass_compressed(run.step(decompress(block), i))
        error = run.streams.error(run.tuning or run.cfg.cluster)
    return {} if error is None else {"loss_after": error}


def _rounded(block: Params, trained: Collection[str], dtype: str) -> Params:
    """Returns the block with codebooks, and whatever else was trained, in 16 bit."""

    def rounded(path: str, leaf: Any) -> Any:
        if isinstance(leaf, CodebookArray):
            return dataclasses.replace(leaf, codebook=round_codebook(leaf.codebook, dtype))
        return round_codebook(leaf, dtype) if path in trained else leaf

    return trees.map_by_path(rounded, block)


def _codebook_dtypes(block: Params) -> dict[str, np.dtype[Any]]:
    return {path: leaf.dtype for path, leaf in trees.iterate(block) if isinstance(leaf, CodebookArray)}


def _warn_of_dtypes(run: Run, i: int, before: Mapping[str, np.dtype[Any]], block: Params) -> None:
    """Warns of the codebooks that tuning moved to where float16 does not hold them as well."""
    if changed := [path for path, dtype in _codebook_dtypes(block).items() if dtype != before[path]]:
        paths = ", ".join(f"{run.model.blocks_path}/{i}/{path}" for path in changed)
        run.reporter.warn(f"stored in bfloat16 after tuning, because float16 holds their codes worse: {paths}")
