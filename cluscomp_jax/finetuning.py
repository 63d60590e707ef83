"""finetune: the loop around the training step. Batches in, states saved, losses recorded, a compressed model out.

Sees a Model, a ParamSource and a sink; knows no file format but that states lie in a folder it is given.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cluscomp_jax.errors import DivergedError, InputError
from cluscomp_jax.examples import Batches, Examples, ShuffledBatches
from cluscomp_jax.finetune_config import FinetuneConfig
from cluscomp_jax.io.train_states import TrainStates
from cluscomp_jax.model import Model, build_model, check_tokens
from cluscomp_jax.optimizer import make_schedule
from cluscomp_jax.progress import Reporter, SilentReporter
from cluscomp_jax.source import BlockSink, DictSink, ParamSource, as_source, run_fingerprint
from cluscomp_jax.training import (
    Layout,
    TrainState,
    evaluate_step,
    init_state,
    make_sharding,
    merge_params,
    round_masters,
    split_params,
    train_step,
)
from cluscomp_jax.trees import Params


@dataclasses.dataclass(frozen=True)
class FinetuneSummary:
    """What a run did.

    Attributes:
      trained_parameters: how many numbers trained.
      steps: optimiser steps, those before an interruption too.
      first_step: the step this process began behind.
      losses: mean training loss, nats per token, of the first and of the last tenth of all steps.
      evaluations: per evaluation step, nll (nats per scored token), perplexity and tokens.
      seconds: wall time of this process's part.
    """

    trained_parameters: int
    steps: int
    first_step: int
    losses: tuple[float, float]
    evaluations: tuple[dict[str, Any], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as plain JSON values."""
        return dataclasses.asdict(self)


def finetune(
    params: Mapping[Any, Any] | ParamSource,
    batches: Batches | Examples | np.ndarray,
    cfg: FinetuneConfig,
    *,
    evaluation: Examples | None = None,
    state_dir: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Params:
    """Returns the params after `cfg.training.steps` steps of next-token loss, on the host.

    What does not train comes back bit for bit; what does is rounded to the dtype it came in. Where several processes
    make one run (`jax.distributed`), all call this with the same arguments and get the same result; `state_dir` is then
    a folder that they share.

    Args:
      params: a nested dict in the FlaxLlama layout, compressed or not, or a ParamSource.
      batches: rows to train on: int [n, t], all scored; Examples; or an object that hands out the rows of each step.
        Rows are taken in an order that cfg.seed draws anew in every pass.
      cfg: the run; `cfg.model` is the family's config.
      evaluation: rows whose loss is recorded, of the model as it would be stored then.
      state_dir: a folder for saved states; with one, the same call resumes after an interruption, and ends in the
        same bits as a run that was not interrupted.
      reporter: is told of progress; silent by default.

    Raises:
      InputError: whatever does not fit, before any long work.
      DivergedError: a loss or gradient was not finite; the state before that step is saved.
      RunError: the disk is full or fails.
    """
    model = build_model(cfg.model)
    sink = DictSink()
    finetune_stream(
        as_source(params, model),
        sink,
        batches,
        cfg,
        evaluation=evaluation,
        state_dir=None if state_dir is None else Path(state_dir),
        reporter=reporter,
    )
    return sink.params(model)


def finetune_stream(
    source: ParamSource,
    sink: BlockSink | None,
    batches: Batches | Examples | np.ndarray,
    cfg: FinetuneConfig,
    *,
    evaluation: Examples | None = None,
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
        check_tokens(evaluation.tokens, model, "evaluation tokens")
    _checked(batches, 0, cfg, model)
    sharding = make_sharding(cfg.mesh, model)
    trained, frozen, layout = split_params(source, model, cfg.training.trainable, sharding)
    state = init_state(trained, settings=cfg.training, sharding=sharding)
    del trained
    with contextlib.ExitStack() as stack:
        states = None
        if state_dir is not None:
            identity = fingerprint(source, cfg, batches, evaluation)
            states = stack.enter_context(TrainStates(state_dir, keep=cfg.keep, fingerprint=identity))
        run = _Run(cfg, layout, frozen, batches, evaluation, states, reporter or SilentReporter())
        state = run.resume(state)
        first = int(state.step)
        state = run.steps(state)
    for block, tree in merge_params(state.trained, frozen, layout):
        if sink is None:
            continue  # what other processes store they can gather only together with this one
        if block is None:
            sink.store_rest(tree)
        elif block >= finished_blocks:
            sink.store_block(block, tree)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    return FinetuneSummary(
        numbers, cfg.training.steps, first, run.losses(), run.evaluations(), time.monotonic() - began
    )


def as_batches(batches: Batches | Examples | np.ndarray, cfg: FinetuneConfig, model: Model) -> Batches:
    """Returns rows in the order of `cfg.seed`; an object that hands out batches is returned as it is.

    Raises:
      InputError: rows that are none, or tokens outside the vocabulary.
    """
    if isinstance(batches, Batches):
        return batches
    examples = batches if isinstance(batches, Examples) else _all_scored(np.asarray(batches))
    check_tokens(examples.tokens, model, "training tokens")
    return ShuffledBatches(examples, cfg.training.batch_size * cfg.training.accumulation, cfg.seed)


def _all_scored(tokens: np.ndarray) -> Examples:
    return Examples(tokens, np.ones(tokens.shape, bool))


def _checked(batches: Batches, step: int, cfg: FinetuneConfig, model: Model) -> Examples:
    rows = batches.batch(step)
    expected = cfg.training.batch_size * cfg.training.accumulation
    if len(rows) != expected:
        raise InputError(
            f"the batch of step {step} has {len(rows)} rows; batch_size {cfg.training.batch_size} x accumulation "
            f"{cfg.training.accumulation} needs {expected}"
        )
    check_tokens(rows.tokens, model, f"the batch of step {step}")
    return rows


def fingerprint(source: ParamSource, cfg: FinetuneConfig, batches: Batches, evaluation: Examples | None) -> str:
    """Returns the hex digest of everything the result depends on; on the mesh, only its rounding does."""
    evaluated = None if evaluation is None else evaluation.fingerprint
    return run_fingerprint(source, cfg.to_dict(), cfg.model, batches=batches.fingerprint, evaluation=evaluated)


class _Run:
    """One run between its steps: what stands still, and the records so far."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        layout: Layout,
        frozen: Params,
        batches: Batches,
        evaluation: Examples | None,
        states: TrainStates | None,
        reporter: Reporter,
    ):
        self.cfg, self.layout, self.frozen, self.batches = cfg, layout, frozen, batches
        self.evaluation, self.states, self.reporter = evaluation, states, reporter
        self.records: list[dict[str, Any]] = []
        self.saved = 0
        self.rate = make_schedule(cfg.training, cfg.training.steps)

    def resume(self, state: TrainState) -> TrainState:
        """Returns the newest saved state, or this one; tells the reporter again what had been recorded by then."""
        found = None if self.states is None else self.states.newest(state)
        if found is not None:
            state = TrainState(*found[0])
            self.saved = int(state.step)
            # An evaluation of this very state is made anew by the next step.
            self.records = [r for r in found[1] if (r["event"], r["step"]) != ("evaluation", self.saved)]
            for record in self.records:
                self.reporter.record(**record)
        return state

    def steps(self, state: TrainState) -> TrainState:
        """Returns the state after all steps that are left."""
        total, rows = self.cfg.training.steps, self.cfg.training.batch_size * self.cfg.training.accumulation
        first = int(state.step)
        length = _checked(self.batches, 0, self.cfg, self.layout.model).tokens.shape[1]
        self.reporter.start("finetune", (total - first) * rows * length, "tokens")
        for step in range(first, total):
            if self._due(step):
                self._evaluate(state, step)
            state = self._step(state, step)
            if (step + 1) % self.cfg.save_every == 0 or step + 1 == total:
                self._save(state, step + 1)
        self._evaluate(state, total)
        return state

    def _due(self, step: int) -> bool:
        every = self.cfg.evaluate_every
        return step == 0 or (every is not None and step % every == 0)

    def _step(self, state: TrainState, step: int) -> TrainState:
        began = time.monotonic()
        settings = self.cfg.training
        rows = _checked(self.batches, step, self.cfg, self.layout.model)
        shape = (settings.accumulation, settings.batch_size, rows.tokens.shape[1])
        tokens, scored = (self._put(np.reshape(array, shape)) for array in (rows.tokens, rows.scored))
        state, metrics = train_step(state, self.frozen, tokens, scored, layout=self.layout, settings=settings)
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if not bool(metrics.finite):
            self._save(state, step)
            raise DivergedError(
                f"step {step + 1}: the loss is {loss}, the norm of its gradient {norm}; its batch was "
                f"{self.batches.describe(step)}; the state behind step {step} is kept; lower the learning rate, or "
                "look at these rows"
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
            tokens, scored = (
                self._put(_filled(array[begin : begin + size], size))
                for array in (self.evaluation.tokens, self.evaluation.scored)
            )
            loss, scores = evaluate_step(
                stored, self.frozen, tokens, scored, layout=self.layout, settings=self.cfg.training
            )
            total, count = total + float(loss), count + int(scores)
        nll = total / count
        # exp of anything above would be no float any more.
        self._record("evaluation", step=step, nll=nll, perplexity=math.exp(min(nll, 700.0)), tokens=count)

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
            self.states.save(step, state, self.records)
            self.saved = step

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
