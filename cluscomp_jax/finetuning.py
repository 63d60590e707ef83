"""finetune: rows in, a finetuned model out. The steps between are those of `cluscomp_jax.training.run`.

Knows a Model, a ParamSource and a sink; no file format, except that states are in a folder given by the caller.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cluscomp_jax.checkpoint.train_states import TrainStates
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model, build_model, check_tokens
from cluscomp_jax.models.source import BlockSink, DictSink, Fingerprint, ParamSource, as_source, run_fingerprint
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.text.token_rows import Batches, ShuffledBatches, TokenRows
from cluscomp_jax.training import (
    changed_dtypes,
    init_state,
    load_teacher,
    make_sharding,
    merge_params,
    split_params,
)
from cluscomp_jax.training.run import FinetuneRun, checked_batch


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
    check_context(checked_batch(batches, 0, cfg, model).tokens.shape[1], model)
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
        run = FinetuneRun(cfg, layout, frozen, batches, evaluation, followed, states, reporter or SilentReporter())
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
