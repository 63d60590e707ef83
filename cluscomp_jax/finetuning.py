"""finetune: the loop around the training step. Batches in, states saved, losses recorded, a compressed model out.

Knows a Model, a ParamSource and a sink; no file format, except that states are in a folder given by the caller.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.checkpoint.train_states import TrainStates
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import DivergedError, InputError
from cluscomp_jax.models.model import Model, build_model, check_tokens
from cluscomp_jax.models.source import BlockSink, DictSink, Fingerprint, ParamSource, as_source, run_fingerprint
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.text.token_rows import Batches, ShuffledBatches, TokenRows
from cluscomp_jax.training import (
    Layout,
    Teacher,
    TrainState,
    changed_dtypes,
    evaluate_step,
    init_state,
    load_teacher,
    make_sharding,
    merge_params,
    round_masters,
    split_params,
    train_step,
)
from cluscomp_jax.tuning.optimizer import make_schedule


class TeacherSource(NamedTuple):
    """A model to learn from: where its parameters come from, and what computes with them."""

    source: ParamSource
    model: Model


@dataclasses.dataclass(frozen=True)
class FinetuneSummary:
    """What a run did.

    Attributes:
      trained_parameters: how many numbers trained.
      steps: optimiser steps, those before an interruption too.
      first_step: the number of steps done before this process began.
      losses: mean training loss, nats per token, of the first and of the last tenth of all steps.
      evaluations: per evaluation step, nll (nats per scored token), perplexity and tokens.
      result_step: the number of steps after which the result was taken; fewer than `steps` where an earlier
        state was the best.
      seconds: wall time of this process's part.
    """

    trained_parameters: int
    steps: int
    first_step: int
    losses: tuple[float, float]
    evaluations: tuple[dict[str, Any], ...]
    result_step: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as plain JSON values."""
        return dataclasses.asdict(self)


def finetune(
    params: Mapping[Any, Any] | ParamSource,
    batches: Batches | TokenRows | np.ndarray,
    cfg: FinetuneConfig,
    *,
    evaluation: TokenRows | np.ndarray | None = None,
    teacher: Mapping[Any, Any] | ParamSource | None = None,
    teacher_config: Any = None,
    state_dir: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Params:
    """Returns the params after `cfg.training.steps` steps of next-token loss, on the host.

    What does not train comes back bit for bit; what does is rounded to the dtype it came in, or to bfloat16 where
    float16 holds it worse, which the reporter warns of. Where several processes
    make one run (`jax.distributed`), all call this with the same arguments and get the same result; `state_dir` is then
    a folder that they share.

    Args:
      params: a nested dict in the FlaxLlama layout, compressed or not, or a ParamSource.
      batches: rows to train on: int [n, t], all scored; TokenRows; or an object that gives the rows of each step.
        Rows are taken in an order that cfg.seed draws for every pass.
      cfg: the run; `cfg.model` is the family's config.
      evaluation: rows whose loss is recorded, of the model as it would be stored then.
      teacher: the model that `cfg.training.distillation` follows, of the same vocabulary; it stays on the device.
      teacher_config: its family's config; None: that of `cfg.model`.
      state_dir: a folder for saved states; with one, the same call resumes after an interruption, and ends in the
        same bits as a run that was not interrupted.
      reporter: receives progress; silent by default.

    Raises:
      InputError: whatever does not fit, before any long work.
      DivergedError: a loss or gradient was not finite; the state before that step is saved.
      RunError: the disk is full or fails.
    """
    model, followed = build_model(cfg.model), None
    if teacher is not None:
        teacher_model = model if teacher_config is None else build_model(teacher_config)
        followed = TeacherSource(as_source(teacher, teacher_model), teacher_model)
    sink = DictSink()
    finetune_stream(
        as_source(params, model),
        sink,
        batches,
        cfg,
        evaluation=evaluation,
        teacher=followed,
        state_dir=None if state_dir is None else Path(state_dir),
        reporter=reporter,
    )
    return sink.params(model)


def finetune_stream(
    source: ParamSource,
    sink: BlockSink | None,
    batches: Batches | TokenRows | np.ndarray,
    cfg: FinetuneConfig,
    *,
    evaluation: TokenRows | np.ndarray | None = None,
    teacher: TeacherSource | None = None,
    state_dir: Path | None = None,
    reporter: Reporter | None = None,
    finished_blocks: int = 0,
) -> FinetuneSummary:
    """As `finetune`, from a source into a sink, which already has the first `finished_blocks` blocks.

    Of several processes one has a sink, the others None.
    """
    began = time.monotonic()
    model = build_model(cfg.model)
    batches = as_batches(batches, cfg, model)
    if evaluation is not None:
        evaluation = evaluation if isinstance(evaluation, TokenRows) else _all_scored(np.asarray(evaluation))
        check_tokens(evaluation.tokens, model, "evaluation tokens")
        check_context(evaluation.tokens.shape[1], model)
    check_context(_checked(batches, 0, cfg, model).tokens.shape[1], model)
    check_teacher(cfg, model, teacher)
    if cfg.result == "best" and evaluation is None:
        raise InputError("result is 'best', but there are no evaluation rows to judge by; give some, or take the last")
    sharding = make_sharding(cfg.mesh, model)
    trained, frozen, layout = split_params(source, model, cfg.training.trainable, sharding)
    state = init_state(trained, settings=cfg.training, sharding=sharding)
    del trained
    followed = None if teacher is None else load_teacher(*teacher, make_sharding(cfg.mesh, teacher.model))
    with contextlib.ExitStack() as stack:
        states = None
        if state_dir is not None:
            identity = fingerprint(source, cfg, batches, evaluation, teacher)
            states = stack.enter_context(TrainStates(state_dir, keep=cfg.keep, fingerprint=identity.digest))
        run = _Run(cfg, layout, frozen, batches, evaluation, followed, states, reporter or SilentReporter())
        state = run.resume(state)
        first = int(state.step)
        trained = run.steps(state)
    changed: list[str] = []
    for block, tree in merge_params(trained, frozen, layout):
        if sink is None:
            continue  # what other processes store they can gather only together with this one
        changed += changed_dtypes(tree, block, layout)
        if block is None:
            sink.store_outer(tree)
        elif block >= finished_blocks:
            sink.store_block(block, tree)
    if changed:
        run.reporter.warn(
            f"stored in bfloat16 after finetuning, because float16 holds them worse: {', '.join(changed)}"
        )
    return FinetuneSummary(
        trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(trained)),
        steps=cfg.training.steps,
        first_step=first,
        losses=run.losses(),
        evaluations=run.evaluations(),
        result_step=run.best_step() if cfg.result == "best" else cfg.training.steps,
        seconds=time.monotonic() - began,
    )


def check_teacher(cfg: FinetuneConfig, model: Model, teacher: TeacherSource | None) -> None:
    """Raises InputError unless there is a teacher where, and only where, the settings follow one that fits."""
    if teacher is None:
        if cfg.training.distillation is not None:
            raise InputError(
                "training.distillation is set, but there is no teacher; give one, or leave the setting out"
            )
        return
    if cfg.training.distillation is None:
        raise InputError("a teacher is given, but training.distillation is not set; set it, or leave the teacher out")
    theirs, ours = teacher.model.config.vocab_size, model.config.vocab_size
    if theirs != ours:
        raise InputError(f"the teacher's vocabulary has {theirs} tokens, the model's {ours}; take one of the same")


def as_batches(batches: Batches | TokenRows | np.ndarray, cfg: FinetuneConfig, model: Model) -> Batches:
    """Returns rows in the order of `cfg.seed`; an object that gives batches is returned as it is.

    Raises:
      InputError: rows that are none, or tokens outside the vocabulary.
    """
    if isinstance(batches, Batches):
        return batches
    examples = batches if isinstance(batches, TokenRows) else _all_scored(np.asarray(batches))
    check_tokens(examples.tokens, model, "training tokens")
    return ShuffledBatches(examples, cfg.training.batch_size * cfg.training.grad_accumulation_steps, cfg.seed)


def _all_scored(tokens: np.ndarray) -> TokenRows:
    return TokenRows(tokens, np.ones(tokens.shape, bool))


def check_context(length: int, model: Model, what: str = "rows") -> None:
    """Raises InputError where rows of `length` tokens, called `what`, exceed the model's context."""
    context = getattr(getattr(model, "switches", model.config), "max_position_embeddings", None)
    if context is not None and length > context:
        raise InputError(f"{what} of {length} tokens exceed the model's context of {context}; give {context} or less")


def _checked(batches: Batches, step: int, cfg: FinetuneConfig, model: Model) -> TokenRows:
    rows = batches.batch(step)
    expected = cfg.training.batch_size * cfg.training.grad_accumulation_steps
    if len(rows) != expected:
        raise InputError(
            f"the batch of step {step} has {len(rows)} rows; batch_size {cfg.training.batch_size} x accumulation "
            f"{cfg.training.grad_accumulation_steps} needs {expected}"
        )
    check_tokens(rows.tokens, model, f"the batch of step {step}")
    return rows


def fingerprint(
    source: ParamSource,
    cfg: FinetuneConfig,
    batches: Batches,
    evaluation: TokenRows | None,
    teacher: TeacherSource | None = None,
) -> Fingerprint:
    """Returns everything the result depends on; on the mesh, only its rounding does."""
    inputs = {
        "batches": batches.fingerprint,
        "evaluation": None if evaluation is None else evaluation.fingerprint,
        "teacher": None if teacher is None else _identity(teacher),
    }
    return run_fingerprint(source, cfg.to_dict(), cfg.model, **inputs)


def _identity(teacher: TeacherSource) -> str:
    return hashlib.sha256(f"{teacher.source.fingerprint()} {teacher.model.config!r}".encode()).hexdigest()


class _Run:
    """One run between its steps: what is frozen, and the records so far."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        layout: Layout,
        frozen: Params,
        batches: Batches,
        evaluation: TokenRows | None,
        teacher: Teacher | None,
        states: TrainStates | None,
        reporter: Reporter,
    ):
        self.cfg, self.layout, self.frozen, self.batches = cfg, layout, frozen, batches
        self.evaluation, self.teacher, self.states, self.reporter = evaluation, teacher, states, reporter
        self.records: list[dict[str, Any]] = []
        self.best: Params = {}
        self.saved = 0
        self.rate = make_schedule(cfg.training, cfg.training.steps)

    def resume(self, state: TrainState) -> TrainState:
        """Returns the newest saved state, or this one; sends the reporter again the records up to then."""
        self.best = jax.tree.map(jnp.copy, state.trained) if self.cfg.result == "best" else {}
        found = None if self.states is None else self.states.newest((state, self.best))
        if found is not None:
            (state, self.best), self.records = found
            state = TrainState(*state)
            self.saved = int(state.step)
            for record in self.records:
                self.reporter.record(**record)
        return state

    def steps(self, state: TrainState) -> Params:
        """Returns what is to be stored after all steps that are left: the last masters, or the best ones."""
        total, rows = self.cfg.training.steps, self.cfg.training.batch_size * self.cfg.training.grad_accumulation_steps
        first, every = int(state.step), self.cfg.evaluate_every or total
        length = _checked(self.batches, 0, self.cfg, self.layout.model).tokens.shape[1]
        self.reporter.start("finetune", (total - first) * rows * length, "tokens")
        if first == 0:
            self._evaluate(state, 0)
        for step in range(first, total):
            state = self._step(state, step)
            done = step + 1
            if done % every == 0 or done == total:
                self._evaluate(state, done)
            if done % self.cfg.save_every == 0 or done == total:
                self._save(state, done)
        return self.best if self.cfg.result == "best" else state.trained

    def _step(self, state: TrainState, step: int) -> TrainState:
        began = time.monotonic()
        settings = self.cfg.training
        rows = _checked(self.batches, step, self.cfg, self.layout.model)
        shape = (settings.grad_accumulation_steps, settings.batch_size, rows.tokens.shape[1])
        tokens, loss_mask = (self._put(np.reshape(array, shape)) for array in (rows.tokens, rows.loss_mask))
        state, metrics = train_step(
            state, self.frozen, tokens, loss_mask, self.teacher, layout=self.layout, settings=settings
        )
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if not bool(metrics.finite):
            self._save(state, step)
            kept = f"the state after step {step} is kept" if self.saved else "no state before it is kept"
            raise DivergedError(
                f"step {step + 1}: the loss is {loss}, the norm of its gradient {norm}; its batch was "
                f"{self.batches.describe(step)}; {kept}; look at these rows, or lower the learning rate, for which "
                "another output folder is needed"
            )
        self._record(
            "step",
            step=step + 1,
            loss=loss,
            gradient_norm=norm,
            learning_rate=float(self.rate(step)),
            scored=int(metrics.scored),
            seconds=time.monotonic() - began,
        )
        self.reporter.advance(rows.tokens.size, note=f"loss {loss:.4f}")
        return state

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Records the loss over the evaluation rows, of the model as it would be stored now."""
        if self.evaluation is None:
            return
        # On a CPU, the collectives of two programs at work at once may wait for one another for ever.
        stored = jax.block_until_ready(round_masters(state.trained, layout=self.layout))  # type: ignore[no-untyped-call]
        size = self.cfg.training.batch_size
        total, count = 0.0, 0
        for begin in range(0, len(self.evaluation), size):
            tokens, loss_mask = (
                self._put(_filled(array[begin : begin + size], size))
                for array in (self.evaluation.tokens, self.evaluation.loss_mask)
            )
            loss, scores = evaluate_step(
                stored, self.frozen, tokens, loss_mask, layout=self.layout, settings=self.cfg.training
            )
            total, count = total + float(loss), count + int(scores)
        nll = total / count
        # exp of anything above would be no float any more.
        self._record("evaluation", step=step, nll=nll, perplexity=math.exp(min(nll, 700.0)), tokens=count)
        if self.cfg.result == "best" and self.best_step() == step:
            self.best = jax.tree.map(jnp.copy, state.trained)

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Returns rows [..., b, t] on the device or devices."""
        sharding = self.layout.sharding
        return jax.device_put(rows) if sharding is None else sharding.put_rows(rows)

    def _record(self, event: str, **fields: Any) -> None:
        record = {"event": event, "time": time.time(), **fields}
        self.records.append(record)
        self.reporter.record(**record)

    def _save(self, state: TrainState, step: int) -> None:
        if self.states is not None and step > self.saved:
            self.states.save(step, (state, self.best), self.records)
            self.saved = step

    def best_step(self) -> int:
        """Returns the step of the lowest evaluation, of equal ones the first."""
        measured = [record for record in self.records if record["event"] == "evaluation"]
        return int(min(measured, key=lambda r: math.inf if math.isnan(r["nll"]) else r["nll"])["step"])

    def losses(self) -> tuple[float, float]:
        """Returns the mean loss of the first and of the last tenth of all steps."""
        losses = [record["loss"] for record in self.records if record["event"] == "step"]
        tenth = -(-len(losses) // 10)
        return float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))

    def evaluations(self) -> tuple[dict[str, Any], ...]:
        """Returns what was measured, in order, less the times."""
        kept = ("step", "nll", "perplexity", "tokens")
        return tuple({key: r[key] for key in kept} for r in self.records if r["event"] == "evaluation")


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns `size` rows; those that are lacking are zeros, which score nothing."""
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))
