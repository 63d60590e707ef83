"""One run of finetuning: step after step, with its saved states, its evaluations and its records."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.checkpoint.train_states import TrainStates
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import DivergedError, InputError
from cluscomp_jax.models.model import Model, check_tokens
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.text.token_rows import Batches, TokenRows
from cluscomp_jax.training.partition import Layout, Teacher, round_masters
from cluscomp_jax.training.step import TrainState, evaluate_step, train_step
from cluscomp_jax.tuning.optimizer import make_schedule


class FinetuneRun:
    """One run between its steps: what is frozen, and the records so far. Parameters are those of `split_params`."""

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
        length = checked_batch(self.batches, 0, self.cfg, self.layout.model).tokens.shape[1]
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
        rows = checked_batch(self.batches, step, self.cfg, self.layout.model)
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


def checked_batch(batches: Batches, step: int, cfg: FinetuneConfig, model: Model) -> TokenRows:
    """Returns the rows of a step.

    Raises:
      InputError: they are not as many as a step takes, or have tokens outside the vocabulary.
    """
    rows = batches.batch(step)
    expected = cfg.training.batch_size * cfg.training.grad_accumulation_steps
    if len(rows) != expected:
        raise InputError(
            f"the batch of step {step} has {len(rows)} rows; batch_size {cfg.training.batch_size} x accumulation "
            f"{cfg.training.grad_accumulation_steps} needs {expected}"
        )
    check_tokens(rows.tokens, model, f"the batch of step {step}")
    return rows


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns `size` rows; those that are lacking are zeros, which score nothing."""
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))
