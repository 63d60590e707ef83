"""One run of compression: its settings resolved, and what it does with block after block.

Load -> statistics -> cluster -> tune -> propagate -> store. Device memory holds one block and a few batches.
"""

import dataclasses
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
    mixes,
    refuse_growth,
    rules_by_block,
)
from cluscomp_jax.clustering.sensitivity import output_weights, sensitivities
from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, round_codebook
from cluscomp_jax.core.sensitivities import Sensitivities
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.calibration import Calibration, Embeddings, first_samples
from cluscomp_jax.models.model import Model, build_model, run_block
from cluscomp_jax.models.prefetch import BlockReader, BlockWriter
from cluscomp_jax.models.sharding import Sharding, make_sharding, put_whole
from cluscomp_jax.models.source import BlockSink, ParamSource
from cluscomp_jax.models.streams import Streams, embed_streams, write_streams
from cluscomp_jax.plan.budget import forward_batch
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.runtime.timing import StageTimer
from cluscomp_jax.tuning import BlockTuning, split_trainable, tune_block


@dataclasses.dataclass(frozen=True)
class Run:
    """What every block of a run is compressed with.

    Attributes:
      model: the decoder.
      cfg: the settings.
      rules: per block, {block-relative path: rule}.
      tuning: how blocks are tuned; None: they are not.
      output_weights: {path: float32 [d_out]} of the kernels whose outputs' errors do not all count the same.
      streams: inputs of the next block; None: no stage looks at activations.
      sharding: of the devices that share the samples of a batch; None: there is one.
      timer: of the stages.
      reporter: of progress.
    """

    model: Model
    cfg: CompressConfig
    rules: list[Rules]
    tuning: BlockTuningConfig | None
    output_weights: Mapping[str, np.ndarray]
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
        return Run(model, cfg, rules, None, {}, None, sharding, timer, reporter)
    shape = (calibration.shape[0], calibration.shape[1])
    stores = cfg.activation_stores
    together = forward_batch(model, cfg, shape) if stores else 1  # first, as it may refuse the run
    kept_out = 0 if cfg.tuning is None else cfg.tuning.validation_samples
    of_outputs: dict[str, np.ndarray] = {}
    if not alike and mixes(cfg, calibration):

        def measure() -> Sensitivities:
            with timer("sensitivity"):
                judged = first_samples(calibration, shape[0] - kept_out)
                return sensitivities(model, source, judged, settings=cfg.cluster, work_dir=work_dir, reporter=reporter)

        found = records.sensitivities(measure)
        rules = rules_by_block(model, cfg, found.kernels)
        if cfg.cluster.weighs_outputs:
            of_outputs = {path: output_weights(squares) for path, squares in found.outputs.items()}
    streams = None
    if stores:
        numbers = cfg.tuning or BlockTuningConfig()
        # Of as many samples as can be spread, so that only the last batch may be whole on every device.
        spread = max(1, shape[0] // cfg.mesh.data)
        options = {
            "original": "original" in stores,
            "upcoming": "upcoming" in stores,
            "batch_size": cfg.mesh.data * min(spread, together),
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
    return Run(model, cfg, rules, cfg.tuning, of_outputs, streams, sharding, timer, reporter)


def compress_all(run: Run, source: ParamSource, sink: BlockSink, records: RunRecords, finished: int) -> None:
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
        output_weights=run.output_weights,
    )
    block = jax.device_get(block)
    run.timer.release()
    if run.tuning is not None or i + 1 < run.model.num_blocks:
        _pass_original(run, i, dense, kept="upcoming" in run.cfg.activation_stores)
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
    with run.timer("tune"):
        tuned, result = tune_block(
            run.model,
            run.model.layer_type(i),
            block,
            run.streams.compressed,
            run.streams.original,
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
