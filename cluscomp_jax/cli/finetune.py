"""`cluscomp finetune`: checks everything, then trains one compressed model into a new folder."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cluscomp_jax import _version as version
from cluscomp_jax.checkpoint.reader import describe
from cluscomp_jax.checkpoint.recorded import recorded
from cluscomp_jax.checkpoint.writer import run_work_path
from cluscomp_jax.cli.arguments import FinetuneArguments
from cluscomp_jax.cli.command_line import command_line
from cluscomp_jax.cli.folder import METRICS_NAME, carried_tokenizer, claim_folder, including_carried
from cluscomp_jax.cli.mesh import parse_mesh
from cluscomp_jax.cli.outcome import Result, note
from cluscomp_jax.config.finetune import FinetuneConfig, load_finetune_config
from cluscomp_jax.config.training import DistillationConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.finetuning import (
    FinetuneSummary,
    TeacherSource,
    as_batches,
    check_context,
    check_teacher,
    finetune_stream,
    fingerprint,
)
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.models.source import BlockSink
from cluscomp_jax.runtime import distributed
from cluscomp_jax.runtime.reporter import JsonLinesLog, RecordLog, console_reporter
from cluscomp_jax.runtime.tensorboard import FOLDER_NAME as TENSORBOARD_FOLDER
from cluscomp_jax.runtime.tensorboard import TensorBoardLog, remove_scalars
from cluscomp_jax.text.token_rows import Batches, TokenRows, first_few
from cluscomp_jax.text.token_rows_cache import read_cached_examples
from cluscomp_jax.text.training_data import read_examples
from cluscomp_jax.training import make_sharding

_STATES = "states"


def run(arguments: FinetuneArguments) -> Result:
    """Returns what the run did."""
    distributed.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    cfg = finetune_config(arguments)
    logs = tuple(_logs(arguments)) if distributed.is_first() else ()
    opened = open_model(arguments.model)
    if Path(arguments.out).resolve() == Path(arguments.model).resolve():
        raise InputError(f"--out {arguments.out} is the model that is to be finetuned; choose another folder")
    cfg = dataclasses.replace(cfg, model=opened.config)
    check_context(cfg.data.length, opened.model, "rows (--length)")
    make_sharding(cfg.mesh, opened.model)
    cache = arguments.token_cache
    rows = _read(opened, cfg, arguments.data, cache)
    evaluation = None if arguments.evaluation is None else _read(opened, cfg, arguments.evaluation, cache)
    shown = None if arguments.teacher is None else open_model(arguments.teacher)
    teacher = None if shown is None else TeacherSource(shown.source, shown.model)
    check_teacher(cfg, opened.model, teacher)
    batches, out = as_batches(rows, cfg, opened.model), Path(arguments.out)
    task = _Task(opened, cfg, batches, evaluation, teacher, out, logs)
    if not distributed.is_first():
        summary = _assist(task)
        return Result("", {"out": arguments.out, **summary.to_dict()})
    origins = {**_provenance(opened, arguments, rows, evaluation), "teacher": None if shown is None else shown.origin}
    summary = _write(task, len(rows), {**origins, "command": command_line(arguments)})
    return Result(_text(summary, task.out), {"out": arguments.out, **summary.to_dict()})


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is to be done, all checked."""

    opened: OpenedModel
    cfg: FinetuneConfig
    batches: Batches
    evaluation: TokenRows | None
    teacher: TeacherSource | None
    out: Path
    logs: tuple[RecordLog, ...]

    def work(self, sink: BlockSink | None, **progress: Any) -> FinetuneSummary:
        """Trains into the sink; in a run of several processes they all do."""
        return finetune_stream(
            self.opened.source,
            sink,
            self.batches,
            self.cfg,
            evaluation=self.evaluation,
            teacher=self.teacher,
            state_dir=run_work_path(self.out) / _STATES,
            **progress,
        )


def _write(task: _Task, rows: int, provenance: dict[str, Any]) -> FinetuneSummary:
    """Returns what was done, after claiming the folder and finishing it."""
    opened, cfg, out = task.opened, task.cfg, task.out
    with distributed.decided_by_first():
        tokenizer = carried_tokenizer(opened)
        identity = fingerprint(opened.source, cfg, task.batches, task.evaluation, task.teacher)
        identity = including_carried(identity.including(tokenizer=tokenizer.digest), opened)
        claim = claim_folder(out, opened, cfg, identity)
    with claim as writer:
        remove_scalars(out / TENSORBOARD_FOLDER)  # of a process that was stopped, whose run may go on without any
        tokens = cfg.training.steps * cfg.training.batch_size * cfg.training.grad_accumulation_steps * cfg.data.length
        note(f"{opened.name}: {cfg.training.steps} steps, {tokens:,} tokens of {rows} rows of {cfg.data.length}")
        with console_reporter(*task.logs) as reporter:
            summary = task.work(writer, reporter=reporter, finished_blocks=writer.finished_blocks)
        if tokenizer.write is not None:
            writer.store_tokenizer(tokenizer.write)
        if opened.carried is not None:
            writer.store_carried(opened.carried.write)
        provenance = {
            **provenance,
            "tokenizer": tokenizer.digest,
            "mesh": str(cfg.mesh),
            "processes": jax.process_count(),
        }
        writer.finish(provenance=provenance, metrics={"finetune": summary.to_dict()})
    distributed.meet()
    return summary


def _assist(task: _Task) -> FinetuneSummary:
    """Returns what was done by all processes; this one writes nothing but its part of saved states."""
    with distributed.decided_by_first():
        pass  # it claims the folder
    summary = task.work(None)
    distributed.meet()
    return summary


def finetune_config(arguments: FinetuneArguments) -> FinetuneConfig:
    """Returns the settings of a run, without its model: the config file's, replaced by the options that were given.

    Raises:
      InputError: an option without effect, or a value out of its range.
    """
    if arguments.evaluate_every is not None and arguments.evaluation is None:
        raise InputError(
            f"--evaluate-every {arguments.evaluate_every} has no effect without --evaluation FILE; add that, or leave "
            "it out"
        )
    config = FinetuneConfig() if arguments.config is None else load_finetune_config(arguments.config)
    data = _given(arguments, "length", "too_long", "unusable") | (
        {"responses_only": True} if arguments.responses_only else {}
    )
    training = _given(arguments, "steps", "batch_size", "grad_accumulation_steps", "learning_rate", "trainable")
    if arguments.dtype is not None:
        training["compute_dtype"] = arguments.dtype
    if arguments.teacher is not None and config.training.distillation is None:
        training["distillation"] = DistillationConfig()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        training=dataclasses.replace(config.training, **training),
        **_given(arguments, "seed", "evaluate_every", "save_every", "result"),
        mesh=config.mesh if arguments.mesh is None else parse_mesh(arguments.mesh),
    )
    if config.result == "best" and arguments.evaluation is None:
        raise InputError(
            "result is 'best', which needs --evaluation FILE to measure it; add that, or give --result last"
        )
    return config


def _given(arguments: FinetuneArguments, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _logs(arguments: FinetuneArguments) -> Iterator[RecordLog]:
    yield JsonLinesLog(Path(arguments.out) / METRICS_NAME)
    if arguments.tensorboard:
        yield TensorBoardLog(Path(arguments.out) / TENSORBOARD_FOLDER)


def _read(opened: OpenedModel, cfg: FinetuneConfig, spec: str, cache: str | None) -> TokenRows:
    tokenizer: Any = None if Path(spec).suffix == ".npy" else opened.load_tokenizer()
    vocab_size = opened.config.vocab_size
    if cache is None:
        rows = read_examples(spec, tokenizer, cfg.data, vocab_size=vocab_size)
    else:
        store = distributed.is_first()
        rows = read_cached_examples(cache, spec, tokenizer, cfg.data, vocab_size=vocab_size, store=store)
    if len(rows.left_out) and distributed.is_first():
        total = len(rows) + len(rows.left_out)
        note(f"{spec}: {len(rows.left_out)} of {total} lines are left out: {first_few(rows.left_out)}")
    return rows


def _provenance(
    opened: OpenedModel, arguments: FinetuneArguments, rows: TokenRows, evaluation: TokenRows | None
) -> dict[str, Any]:
    def of(name: str | None, examples: TokenRows | None) -> dict[str, Any] | None:
        if examples is None:
            return None
        return {"name": name, "shape": list(examples.tokens.shape), "sha256": examples.fingerprint}

    return {
        "model": opened.origin,
        "original": _original(opened),
        "training": of(arguments.data, rows),
        "evaluation": of(arguments.evaluation, evaluation),
        "versions": version.versions(),
        "device": jax.devices()[0].device_kind,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _original(opened: OpenedModel) -> Any:
    """Returns what a compressed model was made from, by its own record; None of any other model."""
    if opened.kind != "compressed":
        return None
    provenance = recorded(describe(opened.files[0].parent))["provenance"]
    return provenance.get("original") or provenance.get("model")


def _text(summary: FinetuneSummary, out: Path) -> str:
    first, last = summary.losses
    lines = [
        f"{out}: {summary.steps} steps, {summary.trained_parameters:,} numbers trained, {summary.seconds:.1f} s",
        f"training loss {first:.4f} in the first tenth of the steps, {last:.4f} in the last",
    ]
    if summary.evaluations:
        before = summary.evaluations[0]
        after = next(found for found in summary.evaluations if found["step"] == summary.result_step)
        lines.append(
            f"evaluation: perplexity {before['perplexity']:.4f} before, {after['perplexity']:.4f} after "
            f"step {summary.result_step} ({after['tokens']:,} tokens)"
        )
    return "\n".join(lines)
