"""The pipeline, one block at a time: load -> statistics -> cluster -> tune -> propagate -> store.

Sees a Model, a ParamSource and a sink; knows no file format. Device memory holds one block and a few batches.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.block import BlockClustering, Streams
from cluscomp_jax.clustering.matrix import decompress, size_report
from cluscomp_jax.clustering.resolve import check_calibration, mixes, rules_by_block
from cluscomp_jax.clustering.sensitivity import sensitivities
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.settings import BlockTuningConfig, compute_dtype_of
from cluscomp_jax.core import trees
from cluscomp_jax.core.caller_mesh import without_mesh
from cluscomp_jax.core.codebook import CodebookArray, round_codebook
from cluscomp_jax.core.losses import mean_squared_error
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.activations import ActivationStore, run_through
from cluscomp_jax.models.model import build_model, run_block, run_embed
from cluscomp_jax.models.prefetch import BlockReader, BlockWriter
from cluscomp_jax.models.sharding import make_sharding, put_samples, put_whole
from cluscomp_jax.models.source import BlockSink, DictSink, Fingerprint, ParamSource, as_source, run_fingerprint
from cluscomp_jax.plan.budget import forward_batch
from cluscomp_jax.plan.host import scratch_bytes
from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.runtime.scratch import scratch_folder
from cluscomp_jax.runtime.timing import StageTimer
from cluscomp_jax.tuning import BlockTuning, split_trainable, tune_block


@dataclasses.dataclass(frozen=True)
class CompressionSummary:
    """What a run did.

    Attributes:
      matrices: per matrix: path, shape, axis, g, num_codes, bits_per_weight, relative_error, weighted_error, seconds.
      blocks: per block: index, seconds, and what tuning reported, where there was any.
      stages: {stage: {"seconds", "peak_rss_bytes"}}; on a resumed run, of its last part. Peaks are None where the run
        did not have its process to itself.
      bits_per_weight: stored bits per weight of the compressed matrices together.
      total_bytes: stored bytes of all parameters.
    """

    matrices: tuple[dict[str, Any], ...]
    blocks: tuple[dict[str, Any], ...]
    stages: dict[str, dict[str, Any]]
    bits_per_weight: float
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as plain JSON values."""
        return dataclasses.asdict(self)


def compress(
    params: Mapping[Any, Any] | ParamSource,
    cfg: CompressConfig,
    *,
    calibration: np.ndarray | None = None,
    reporter: Reporter | None = None,
    work_dir: str | Path | None = None,
) -> Params:
    """Returns the compressed params: the same tree, its matched kernels CodebookArrays, arrays on the host.

    Args:
      params: a nested dict in the FlaxLlama layout (string or integer layer keys), or a ParamSource.
      cfg: the run; `cfg.model` is the family's config.
      calibration: tokens int [samples, length]; with them clustering is activation-weighted and blocks are tuned
        (where cfg says so), without them matrices are only clustered.
      reporter: is told of progress; silent by default.
      work_dir: an existing folder; up to three streams of activations lie in a temporary one inside it meanwhile
        (`plan.host.scratch_bytes`). None: the system's folder for temporary files.

    Raises:
      InputError: whatever does not fit, before any long work; also activations on the disk.
    """
    model = build_model(cfg.model)
    source = as_source(params, model)
    if isinstance(params, Mapping):
        _check_finite(params)
    sink = DictSink()
    calibration = None if calibration is None else np.asarray(calibration)  # wherever it lies
    needed = 0 if calibration is None or calibration.ndim != 2 else scratch_bytes(model, cfg, calibration.shape)
    with scratch_folder(work_dir, needed) as folder, without_mesh():
        compress_stream(source, sink, cfg, calibration=calibration, work_dir=folder, reporter=reporter)
    return sink.params(model)


def compress_stream(
    source: ParamSource,
    sink: BlockSink,
    cfg: CompressConfig,
    *,
    calibration: np.ndarray | None,
    work_dir: Path,
    reporter: Reporter | None = None,
    finished_blocks: int = 0,
    owns_process: bool = False,
) -> CompressionSummary:
    """Compresses block after block from `source` into `sink` and returns what was done.

    Args:
      calibration: tokens int [samples, length] or None.
      work_dir: scratch for the activation streams and the records of finished blocks. A run that is resumed must
        get the same folder.
      finished_blocks: blocks already in the sink. Their activations are recomputed, not read from scratch files,
        so that an interrupted run gives the bytes of an uninterrupted one.
      owns_process: as for StageTimer: whether freed memory may be given back and the peak of each stage measured.

    Raises:
      InputError: whatever does not fit, before any long work.
    """
    clock = StageTimer(owns_process=owns_process)
    run = _Run(source, sink, cfg, calibration, work_dir, reporter or SilentReporter(), clock)
    records = run.blocks(finished_blocks)
    run.close()
    with run.clock("load"):
        outer = source.load_outer()
    with run.clock("store"):
        sink.store_outer(outer)
    matrices = tuple(matrix for record in records for matrix in record.pop("matrices"))
    weights = sum(math.prod(matrix["shape"]) for matrix in matrices)
    bits = sum(matrix["bits"] for matrix in matrices)
    total_bytes = sum(record["total_bytes"] for record in records) + size_report(outer).total_bytes
    return CompressionSummary(matrices, tuple(records), run.clock.to_dict(), bits / weights, total_bytes)


def fingerprint(source: ParamSource, cfg: CompressConfig, calibration: np.ndarray | None) -> Fingerprint:
    """Returns everything the result's bytes depend on."""
    digest = None if calibration is None else hashlib.sha256(calibration.astype("<i4").tobytes()).hexdigest()
    return run_fingerprint(source, cfg.to_dict(), cfg.model, calibration=digest)


class _Run:
    """The state of one run between blocks: the two activation streams, the rules, the clock."""

    def __init__(
        self,
        source: ParamSource,
        sink: BlockSink,
        cfg: CompressConfig,
        calibration: np.ndarray | None,
        work_dir: Path,
        reporter: Reporter,
        clock: StageTimer,
    ):
        self.model = build_model(cfg.model)
        self.cfg, self.source, self.sink, self.reporter = cfg, source, sink, reporter
        self.rules = rules_by_block(self.model, cfg)
        self.clock = clock
        self.records_dir = work_dir / "records"
        self.records_dir.mkdir(parents=True, exist_ok=True)
        self.tuning = cfg.tuning if calibration is not None else None
        self.sharding = make_sharding(cfg.mesh, self.model)
        self.cluster = BlockClustering(self.model, cfg.cluster, cfg.seed, self.clock, self.reporter, self.sharding)
        self.dtype, self.batch_size = jnp.dtype("float32"), 1
        self.original: ActivationStore | None = None
        self.compressed: ActivationStore | None = None
        self.augmented: ActivationStore | None = None
        if calibration is None:
            return
        check_calibration(self.model, cfg, calibration, self.rules)
        # Of as many samples as can be spread, so that only the last batch may lie whole on every device.
        spread = max(1, len(calibration) // cfg.mesh.data)
        self.batch_size = cfg.mesh.data * min(spread, forward_batch(self.model, cfg, calibration.shape))
        if mixes(cfg, calibration):
            self.rules = rules_by_block(self.model, cfg, self._sensitivities(calibration, work_dir))
        numbers = cfg.tuning or BlockTuningConfig()
        self.dtype = jnp.dtype(compute_dtype_of(numbers))
        if cfg.cluster.calibrated or self.tuning:
            with self.clock("embed"):
                self._embed(calibration, work_dir, jnp.dtype(numbers.activation_dtype))

    def _sensitivities(self, calibration: np.ndarray, work_dir: Path) -> dict[str, float]:
        """Returns {path: sensitivity}, from the records where a run is resumed."""
        path = self.records_dir / "sensitivities.json"
        if not path.exists():
            with self.clock("sensitivity"):
                damping = self.cfg.cluster.damping if self.cfg.cluster.error_feedback else None
                measured = sensitivities(
                    self.model, self.source, calibration, damping=damping, work_dir=work_dir, reporter=self.reporter
                )
            with atomic.writing(path):
                atomic.write_text(path, json.dumps(measured, indent=1), aside=path.with_suffix(".tmp"))
        known: dict[str, float] = json.loads(path.read_text())
        return known

    def _embed(self, calibration: np.ndarray, work_dir: Path, dtype: Any) -> None:
        """Opens the streams that the run needs, at the first block's input."""
        outer = jax.tree.map(jnp.asarray, self.source.load_outer())
        embed = partial(run_embed, outer, model=self.model, dtype=self.dtype)
        width = embed(jnp.asarray(calibration[:1])).shape[-1]
        new_store = partial(ActivationStore, shape=(*calibration.shape, width), dtype=dtype)
        self.compressed = new_store(work_dir / "compressed.bin")
        if self.tuning or self.cfg.cluster.corrects:
            self.original = new_store(work_dir / "original.bin")
        if self.tuning and self.tuning.aug_loss:
            self.augmented = new_store(work_dir / "augmented.bin")
        for i in range(len(calibration)):
            x = embed(jnp.asarray(calibration[i : i + 1]))
            for store in (self.compressed, self.original):
                if store is not None:
                    store.write(slice(i, i + 1), x)

    def close(self) -> None:
        """Removes the scratch files of the streams."""
        for store in (self.original, self.compressed, self.augmented):
            if store is not None:
                store.delete()

    def blocks(self, finished: int) -> list[dict[str, Any]]:
        """Compresses all blocks but the first `finished`, which the sink has, and returns the record of each."""
        for i in range(finished):
            self.report(i)
        count, first = self.model.num_blocks, 0 if self.compressed is not None else finished
        with BlockReader(self.source, count, self.clock, first) as reader, BlockWriter(self.clock) as writer:
            for i in range(first, count):
                if i < finished:
                    self._resume(i, reader)
                    continue
                block, record = self._compress(i, reader)
                with self.clock("store"):
                    writer.wait()
                if i > finished:
                    self.report(i - 1)
                writer.put(partial(self._store, i, block, record))
                del block
            with self.clock("store"):
                writer.wait()
        if finished < count:
            self.report(count - 1)
        return [self._record(i) for i in range(count)]

    def _resume(self, i: int, reader: BlockReader) -> None:
        """Moves the streams behind a block that an earlier process finished."""
        layer_type = self.model.layer_type(i)
        with self.clock("load"):
            dense = put_whole(reader.take(i), self.sharding)
        with self.clock("resume"):
            self._propagate_original(dense, layer_type)
            del dense
            reader.read_next()
            self._propagate_compressed(self.sink.load_block(i), layer_type)

    def _store(self, i: int, block: Params, record: dict[str, Any]) -> None:
        path = self._record_path(i)
        with atomic.writing(path):
            atomic.write_text(path, json.dumps(record), aside=path.with_suffix(".tmp"))
        self.sink.store_block(i, block)

    def _compress(self, i: int, reader: BlockReader) -> tuple[Params, dict[str, Any]]:
        """Returns (block i compressed, on the host; its record), the streams moved behind it.

        What is not needed on the device any more is let go of before the next stage, whose peak it would add to.
        """
        with self.clock("load"):
            dense = reader.take(i)
        if self.tuning is None:
            reader.read_next()  # nothing longer than clustering follows that reading could run beside
        began, layer_type = time.monotonic(), self.model.layer_type(i)
        streams = self._streams()
        if streams is not None and self.cfg.cluster.calibrated:
            dense = jax.device_get(jax.device_put(dense))  # laid out as the device has it: it goes there several times
        block, matrices = self.cluster(i, dense, self.rules[i], streams)
        block = jax.device_get(block)
        self.clock.release()
        if self.tuning is not None or (self.original is not None and i + 1 < self.model.num_blocks):
            dense = put_whole(dense, self.sharding)
            self._propagate_original(dense, layer_type)
        del dense
        self.clock.release()
        reader.read_next()
        record: dict[str, Any] = {"index": i}
        trained: Collection[str] = ()
        if self.tuning is not None and matrices:
            trained = set(split_trainable(block, norms=self.tuning.norms)[0])
            block, tuned = self._tune(i, block, layer_type)
            record |= dataclasses.asdict(tuned)
            if tuned.diverged:
                self.reporter.warn(
                    f"block {i}: loss or gradient was not finite at epoch {len(tuned.epoch_losses)}; "
                    "the last good codebooks are kept"
                )
        block = jax.device_get(_rounded(block, trained, self.cfg.cluster.codebook_dtype))
        self.clock.release()
        if i + 1 < self.model.num_blocks or self.tuning is not None:
            record |= self._propagate_compressed(block, layer_type)
        size = size_report(block)
        record |= {"seconds": time.monotonic() - began, "total_bytes": size.total_bytes, "matrices": matrices}
        return block, record

    def report(self, i: int) -> None:
        """Tells the reporter of finished block i, in the same words whenever it is called."""
        self.reporter.record("block", time=self._record_path(i).stat().st_mtime, **self._record(i))

    def _record_path(self, i: int) -> Path:
        return self.records_dir / f"{i:05d}.json"

    def _record(self, i: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._record_path(i).read_text())
        return record

    def _streams(self) -> Streams | None:
        if self.compressed is None:
            return None
        return Streams(self.compressed, self.original, self.batch_size, self.dtype, self.sharding)

    def _tune(self, i: int, block: Params, layer_type: Hashable) -> tuple[Params, BlockTuning]:
        assert self.tuning is not None
        assert self.compressed is not None
        assert self.original is not None
        train = len(self.compressed) - self.tuning.validation_samples
        steps = self.tuning.epochs * (train // self.tuning.batch_size)
        self.reporter.start(f"block {i + 1}/{self.model.num_blocks}: tune", steps, "steps")
        targets = (self.original,) if self.augmented is None else (self.original, self.augmented)
        rng = np.random.default_rng((self.cfg.seed, i))
        with self.clock("tune"):
            return tune_block(
                self.model,
                layer_type,
                block,
                self.compressed,
                targets,
                self.tuning,
                rng=rng,
                reporter=self.reporter,
                sharding=self.sharding,
            )

    def _through(self, step: Callable[[jax.Array], jax.Array]) -> Callable[[ActivationStore, ActivationStore], None]:
        """Returns what passes one stream through a block into another."""
        put = partial(put_samples, sharding=self.sharding)
        return partial(run_through, step, batch_size=self.batch_size, dtype=self.dtype, put=put)

    def _propagate_original(self, dense: Params, layer_type: Hashable) -> None:
        with self.clock("targets"):
            step = partial(run_block, dense, model=self.model, layer_type=layer_type)
            run = self._through(step)
            if self.augmented is not None and self.compressed is not None:
                run(self.compressed, self.augmented)
            if self.original is not None:
                run(self.original, self.original)

    def _propagate_compressed(self, block: Params, layer_type: Hashable) -> dict[str, float]:
        """Moves the compressed stream behind the block; returns its distance from the original stream there."""
        if self.compressed is None:
            return {}
        with self.clock("propagate"):
            # Decoded first, so that one program serves all blocks, however finely each is cut.
            step = partial(
                run_block, put_whole(decompress(block), self.sharding), model=self.model, layer_type=layer_type
            )
            self._through(step)(self.compressed, self.compressed)
            if self.original is None:
                return {}
            limit = (self.tuning or self.cfg.cluster).massive_activation_limit
            return {"loss_after": _stream_distance(self.compressed, self.original, self.batch_size, limit)}


_squared_error = jax.jit(mean_squared_error, static_argnames="massive_activation_limit")


def _stream_distance(a: ActivationStore, b: ActivationStore, batch_size: int, massive_activation_limit: float) -> float:
    """Returns the mean squared error of stream a against stream b, as tuning counts it."""
    error = partial(_squared_error, massive_activation_limit=massive_activation_limit)
    total = sum(len(x) * float(error(jnp.asarray(x), jnp.asarray(b.read(where)))) for where, x in a.batches(batch_size))
    return total / len(a)


def _rounded(block: Params, trained: Collection[str], dtype: str) -> Params:
    """Returns the block with codebooks, and whatever else was trained, in 16 bit."""

    def rounded(path: str, leaf: Any) -> Any:
        if isinstance(leaf, CodebookArray):
            return dataclasses.replace(leaf, codebook=round_codebook(leaf.codebook, dtype))
        return round_codebook(leaf, dtype) if path in trained else leaf

    return trees.map_by_path(rounded, block)


def _check_finite(params: Mapping[Any, Any]) -> None:
    for path, leaf in trees.flatten(params).items():
        if not isinstance(leaf, CodebookArray) and not bool(jnp.isfinite(jnp.asarray(leaf)).all()):
            raise InputError(f"{path!r} holds NaN or Inf; only finite weights can be compressed")
