"""Compression of one model into one folder: claim, check of the weights, measurement, compression, end. Resumable.

Shared by `compress` and `demo`. Knows no command-line options; prints notes only.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cluscomp_jax import _version as version
from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.checkpoint.writer import CheckpointWriter
from cluscomp_jax.cli.outcome import note
from cluscomp_jax.clustering.summary import CompressionSummary
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.perplexity import Perplexity
from cluscomp_jax.io.hf.safetensors_source import GENERATION_CONFIG
from cluscomp_jax.io.open import OpenedModel
from cluscomp_jax.io.tokenizer import tokenizer_digest, write_tokenizer
from cluscomp_jax.models.calibration import Calibration, Embeddings, digest_of
from cluscomp_jax.models.source import Fingerprint, ParamSource
from cluscomp_jax.pipeline import compress_stream, fingerprint
from cluscomp_jax.plan.host import scratch_bytes
from cluscomp_jax.recovery import recover_stream, recovery_rows
from cluscomp_jax.reporting.tables import format_bytes
from cluscomp_jax.runtime.host_memory import return_freed_memory
from cluscomp_jax.runtime.reporter import JsonLinesLog, Reporter, console_reporter
from cluscomp_jax.runtime.scratch import require_room
from cluscomp_jax.runtime.timing import StageTimer, process_peak_rss_bytes

METRICS_NAME = "metrics.jsonl"
Measure = Callable[[ParamSource, Reporter], Perplexity]


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A finished run.

    Attributes:
      summary: what the pipeline reports.
      perplexity: of "original" and "compressed", where they were measured.
      stages: {stage: {"seconds", "peak_rss_bytes"}}: those of the summary, and before and after them the checks and
        measurements. The checkpoint's own record ends before "finish", which writes it.
      seconds: wall time of this part of the run, checks and measurements included.
      peak_rss_bytes: largest resident set of the process so far.
    """

    summary: CompressionSummary
    perplexity: dict[str, Perplexity]
    stages: dict[str, dict[str, Any]]
    seconds: float
    peak_rss_bytes: int

    @property
    def diverged_blocks(self) -> list[int]:
        """The blocks whose tuning met a loss or gradient that was not finite."""
        return [block["index"] for block in self.summary.blocks if block.get("diverged")]

    def to_dict(self) -> dict[str, Any]:
        """Returns the run as plain JSON values."""
        measured = {name: dataclasses.asdict(value) for name, value in self.perplexity.items()}
        return {
            **self.summary.to_dict(),
            "perplexity": measured,
            "stages": self.stages,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def compress_to_folder(
    opened: OpenedModel,
    cfg: CompressConfig,
    out: Path,
    *,
    calibration: Calibration | None,
    calibration_name: str | None = None,
    measure: Measure | None = None,
    command: str | None = None,
) -> Compressed:
    """Compresses into the checkpoint folder `out` and returns what was done.

    Args:
      opened: the original.
      cfg: the run; its model is that of `opened`.
      out: absent, empty, or the unfinished output of this very run, which is then resumed.
      calibration: int [samples, length] tokens, packed embeddings, or None.
      calibration_name: recorded as their origin.
      measure: called on the original before the work and on the result as it will load, before the folder is finished.
      command: recorded as the command line that asked for it.

    Raises:
      InputError: the folder is not free, or a weight is not finite; no file is left.
      RunError: the disk is full; the same call resumes.
    """
    course, rows = _Course(measure), recovery_rows(opened.model, cfg, calibration)
    with course.before("prepare"):
        tokenizer = carried_tokenizer(opened)
        identity = fingerprint(opened.source, cfg, calibration).including(tokenizer=tokenizer.digest)
        identity = including_carried(identity, opened)
        claim = claim_folder(out, opened, cfg, identity)
    with claim as writer, console_reporter(JsonLinesLog(out / METRICS_NAME)) as reporter:
        _check_scratch(opened, cfg, calibration, writer.work_path)
        with course.before("check weights"):
            _check_weights(opened, reporter)
        course.evaluate("original", opened.source, course.before, reporter)
        if rows is None:
            summary = _compress_blocks(opened, cfg, writer, calibration, writer.work_path, reporter)
        else:
            summary = _compress_and_recover(opened, cfg, writer, rows, identity, course.after, reporter)
        course.evaluate("compressed", _Unfinished(writer, identity.digest), course.after, reporter)
        with course.after("finish"):
            if tokenizer.write is not None:
                writer.store_tokenizer(tokenizer.write)
            if opened.carried is not None:
                writer.store_carried(opened.carried.write)
            provenance = {
                **_provenance(opened, calibration, calibration_name),
                "tokenizer": tokenizer.digest,
                "command": command,
            }
            writer.finish(provenance=provenance, metrics=course.result(summary).to_dict())
    return course.result(summary)


def _compress_blocks(
    opened: OpenedModel,
    cfg: CompressConfig,
    sink: CheckpointWriter,
    calibration: Calibration | None,
    work_path: Path,
    reporter: Reporter,
) -> CompressionSummary:
    if sink.finished_blocks:
        note(f"resuming after {sink.finished_blocks} of {opened.model.num_blocks} finished blocks")
    return compress_stream(
        opened.source,
        sink,
        cfg,
        calibration=calibration,
        work_dir=work_path,
        reporter=reporter,
        finished_blocks=sink.finished_blocks,
        owns_process=True,
    )


def _compress_and_recover(
    opened: OpenedModel,
    cfg: CompressConfig,
    writer: CheckpointWriter,
    rows: np.ndarray,
    identity: Fingerprint,
    timer: StageTimer,
    reporter: Reporter,
) -> CompressionSummary:
    """Compresses into a folder of its own within `work_path`, which ends with the run, and from there into `writer`."""
    with claim_folder(writer.work_path / "compressed", opened, cfg, identity) as aside:
        summary = _compress_blocks(opened, cfg, aside, rows, writer.work_path, reporter)
        return_freed_memory()
        with timer("recover"):
            recovery = recover_stream(
                _Unfinished(aside, identity.digest),
                opened.source,
                writer,
                cfg,
                rows,
                bits=summary.bits_per_weight,
                state_dir=writer.work_path / "states",
                reporter=reporter,
                finished_blocks=writer.finished_blocks,
            )
    return dataclasses.replace(summary, recovery=recovery.to_dict())


class _Course:
    """Stages before and after the pipeline, and perplexities."""

    def __init__(self, measure: Measure | None):
        self.before, self.after = StageTimer(owns_process=True), StageTimer(owns_process=True)
        self._measure = measure
        self._perplexity: dict[str, Perplexity] = {}
        self._began = time.monotonic()

    def evaluate(self, which: str, source: ParamSource, clock: StageTimer, reporter: Reporter) -> None:
        """Measures the model `which`, if anything is to be measured."""
        if self._measure is not None:
            with clock(f"evaluate {which}"):
                self._perplexity[which] = self._measure(source, reporter)

    def result(self, summary: CompressionSummary) -> Compressed:
        """Returns the run as far as it has come."""
        stages = {**self.before.to_dict(), **summary.stages, **self.after.to_dict()}
        seconds = time.monotonic() - self._began
        return Compressed(summary, self._perplexity, stages, seconds, process_peak_rss_bytes())


def including_carried(identity: Fingerprint, opened: OpenedModel) -> Fingerprint:
    """Returns the fingerprint of a run with what is carried along around a text model, if there is any."""
    return identity if opened.carried is None else identity.including(carried=opened.carried.digest())


def claim_folder(
    out: Path, opened: OpenedModel, cfg: CompressConfig | FinetuneConfig, identity: Fingerprint
) -> CheckpointWriter:
    """Returns the writer of `out`, claimed for this run or resumed. Raises as `CheckpointWriter` does."""
    return CheckpointWriter(
        out,
        model_config=opened.model,
        run_config=cfg.to_dict(),
        fingerprint=identity.digest,
        inputs=identity.parts,
    )


def _check_scratch(opened: OpenedModel, cfg: CompressConfig, calibration: Calibration | None, work_path: Path) -> None:
    """Notes the scratch files of a run, so that a person who finds them after a crash knows what they are.

    Raises:
      InputError: the disk has too little space, counting files of a crashed run as free, which this one replaces.
    """
    size = 0 if calibration is None else scratch_bytes(opened.model, cfg, calibration.shape)
    left = sum(path.stat().st_size for path in work_path.glob("*.bin"))
    require_room(work_path, size - left, "choose an output folder on another disk")
    if size:
        note(
            f"{work_path}: {format_bytes(size)} of activations until the run ends; after a crash the same command "
            "makes them anew, and removing the output folder removes them"
        )


class CarriedTokenizer(NamedTuple):
    """The tokenizer that a result carries along.

    Attributes:
      write: writes its files into a folder; None: there is none.
      digest: see `tokenizer_digest`; None: there is none.
    """

    write: Callable[[Path], None] | None
    digest: str | None


def carried_tokenizer(opened: OpenedModel) -> CarriedTokenizer:
    """Returns the tokenizer of a model, and notes where it has none that can be read."""
    try:
        tokenizer = opened.load_tokenizer()
    except InputError as error:
        note(f"{error}; the result will carry no tokenizer")
        return CarriedTokenizer(None, None)
    folder = opened.files[0].parent
    if isinstance(opened.source, CheckpointSource):
        folder = opened.source.tokenizer_path or folder
    stops = folder / GENERATION_CONFIG

    def write(to: Path) -> None:
        write_tokenizer(tokenizer, to)
        if opened.kind != "gguf" and stops.is_file():
            shutil.copyfile(stops, to / GENERATION_CONFIG)

    return CarriedTokenizer(write, tokenizer_digest(tokenizer))


def _check_weights(opened: OpenedModel, reporter: Reporter) -> None:
    """Reads every weight once, so that a damaged last block ends the run now, not after hours."""
    reporter.start("check weights", opened.model.num_blocks, "blocks")
    opened.source.load_outer()
    for i in range(opened.model.num_blocks):
        opened.source.load_block(i)
        return_freed_memory()
        reporter.advance()


def _provenance(opened: OpenedModel, calibration: Calibration | None, name: str | None) -> dict[str, Any]:
    text: dict[str, Any] | None = None
    if calibration is not None:
        text = {"name": name, "shape": list(calibration.shape), "sha256": digest_of(calibration)}
        if isinstance(calibration, Embeddings):
            text["kind"] = "embeddings"
    return {
        "model": opened.origin,
        "calibration": text,
        "versions": version.versions(),
        "device": jax.devices()[0].device_kind,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclasses.dataclass(frozen=True)
class _Unfinished:
    """The ParamSource of a checkpoint that lacks only its end; `digest` is that of the run."""

    writer: CheckpointWriter
    digest: str

    def load_block(self, i: int) -> Params:
        return self.writer.load_block(i)

    def load_outer(self) -> Params:
        return self.writer.load_outer()

    def fingerprint(self) -> str:
        return f"unfinished {self.digest}"
