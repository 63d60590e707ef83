"""`cluscomp evaluate`: the perplexity of a text under any model that can be opened, or its share of exact answers."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.evaluations import add_evaluation, read_evaluations, stage_of
from cluscomp_jax.checkpoint.reader import describe as describe_checkpoint
from cluscomp_jax.checkpoint.recorded import recorded
from cluscomp_jax.cli.arguments import DEFAULT_ANSWER_TOKENS, EvaluateArguments
from cluscomp_jax.cli.inputs import begin_token, read_tokens, require_windows
from cluscomp_jax.cli.outcome import DONE, FAILED, Result, note
from cluscomp_jax.config.numerics import Dtype
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.evaluation.exact_match import GSM8K_ANSWER, answer_pattern, exact_match
from cluscomp_jax.evaluation.perplexity import Perplexity, perplexity, scratch_bytes
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.io.tokenizer import stop_tokens, tokenizer_digest
from cluscomp_jax.models.model import check_length
from cluscomp_jax.reporting.tables import format_bytes
from cluscomp_jax.runtime.reporter import console_reporter
from cluscomp_jax.runtime.scratch import require_room, scratch_parent
from cluscomp_jax.text.text import begin_windows
from cluscomp_jax.text.training_data import read_questions

_MUCH = 2**28


def run(arguments: EvaluateArguments) -> Result:
    """Returns what was measured, and on what."""
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: it must be 1 or more")
    if arguments.exact_match is None:
        return _run_perplexity(arguments)
    return _run_exact_match(arguments, arguments.exact_match)


def _run_perplexity(arguments: EvaluateArguments) -> Result:
    if arguments.text is None:
        raise InputError("nothing to measure; give --text TEXT or --exact-match FILE")
    for name in ("answer", "max_new_tokens"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} has no effect without --exact-match FILE; leave it out")
    if arguments.tokens is not None and arguments.tokens < arguments.context:
        raise InputError(
            f"--tokens {arguments.tokens} do not fill one window of --context {arguments.context}; lower it"
        )
    opened = open_model(arguments.model)
    tokenizer = None
    stage = None if arguments.record is None else _stage(opened, Path(arguments.record))
    if arguments.record is not None:
        read_evaluations(Path(arguments.record))  # refuses a record that cannot be added to, before the work
        tokenizer = _same_tokenizer(opened, arguments.text, Path(arguments.record))
    tokens = read_tokens(opened, arguments.text, first=arguments.tokens)
    require_windows(arguments.text, tokens, arguments.context)
    begin = begin_token(opened, arguments.text) if arguments.begin_windows else None
    if begin is not None:
        tokens = begin_windows(tokens, begin, arguments.context)
    note_context("--context", arguments.context, opened)
    shape = (len(tokens) // arguments.context, arguments.context)
    check_scratch(shape, opened, arguments.dtype, work_dir=arguments.work_dir, option="--work-dir")
    with console_reporter() as reporter:
        measured = perplexity(
            opened.source,
            tokens,
            opened.model,
            context=arguments.context,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            reporter=reporter,
            work_dir=arguments.work_dir,
        )
    fields: dict[str, Any] = {**dataclasses.asdict(measured), "model": opened.name, "text": arguments.text}
    lines = [describe(measured)]
    if begin is not None:
        fields["windows_begin_with"] = begin
        lines.append(f"every window begins with token {begin}")
    if arguments.record is not None and not math.isfinite(measured.perplexity):
        lines.append(f"not noted in {arguments.record}: it is not finite")
    elif arguments.record is not None:
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            record = {"stage": stage, **fields, "tokenizer": tokenizer, "finished": finished}
            file = add_evaluation(Path(arguments.record), record)
        except RunError as error:  # what was measured is still shown
            note(f"error: not noted: {error}; then give the same command again")
            return Result("\n".join(lines), {**fields, "stage": stage}, FAILED)
        lines.append(f"noted as {stage!r} in {file}")
    return Result("\n".join(lines), {**fields, "stage": stage}, DONE if math.isfinite(measured.perplexity) else FAILED)


def note_context(what: str, length: int, opened: OpenedModel) -> None:
    """Notes where windows or samples are longer than the model's own context.

    Raises:
      InputError: they are longer than its table of learned positions.
    """
    check_length(length, opened.model, what)
    most = getattr(opened.config, "max_position_embeddings", None)
    if most is not None and length > most:
        note(f"{what} {length} is more than the model's own context of {most}; it may do badly there")


def check_scratch(
    shape: tuple[int, int], opened: OpenedModel, dtype: Dtype, *, work_dir: str | None = None, option: str = "TMPDIR"
) -> None:
    """Notes the disk space of an evaluation where it is large: the folder can be on another disk than the model.

    Args:
      shape: (windows, context).
      opened: the model.
      dtype: compute dtype.
      work_dir: as for `perplexity`.
      option: the option or variable that sets another folder.

    Raises:
      InputError: there is no such folder, or its disk has too little space.
    """
    size, folder = scratch_bytes(opened.model, shape, dtype), scratch_parent(work_dir)
    require_room(folder, size, f"choose another folder by {option}")
    if size >= _MUCH:
        note(f"{folder}: {format_bytes(size)} of activations until it ends; {option} sets another folder")


def _stage(opened: OpenedModel, folder: Path) -> str:
    """Returns which stage a model is of the run that made `folder`.

    Raises:
      InputError: `folder` is no compressed folder, or the model is none of its stages.
    """
    run = recorded(describe_checkpoint(folder))
    inputs = _inputs(run)
    if opened.kind != "compressed" and opened.origin["files"] in inputs:
        return "original"
    if opened.kind == "compressed":
        place = opened.files[0].parent
        mine = recorded(describe_checkpoint(place))
        related = [opened.origin["files"], *_inputs(mine)]
        if place.samefile(folder) or any(files in inputs for files in related):
            return stage_of(mine)
    raise InputError(
        f"--record {folder}: {opened.name} is neither that folder, nor what it was made from, nor made from the same "
        "files; leave --record out"
    )


def _same_tokenizer(opened: OpenedModel, text: str, folder: Path) -> str | None:
    """Returns the digest of the tokenizer that makes tokens of a text; None where the text is tokens.

    Raises:
      InputError: the checkpoint in `folder` has another tokenizer.
    """
    if Path(text).suffix == ".npy":
        return None
    digest = tokenizer_digest(opened.load_tokenizer())
    theirs = recorded(describe_checkpoint(folder))["provenance"].get("tokenizer")
    if theirs not in (None, digest):
        raise InputError(
            f"--record {folder}: {opened.name} has another tokenizer ({digest[:12]}) than that folder "
            f"({str(theirs)[:12]}), so the two count different tokens; leave --record out"
        )
    return digest


def _inputs(manifest: Mapping[str, Any]) -> list[Any]:
    """Returns the lists of files, with sizes and checksums, that a checkpoint was made from."""
    origins = (manifest["provenance"].get(name) for name in ("model", "original"))
    return [origin["files"] for origin in origins if origin and origin.get("files")]


def _run_exact_match(arguments: EvaluateArguments, file: str) -> Result:
    if arguments.begin_windows:
        raise InputError("--begin-windows has no effect with --exact-match; leave one out")
    for name in ("text", "tokens", "record", "work_dir"):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')} {getattr(arguments, name)}"
            raise InputError(f"{option} has no effect with --exact-match; leave one out")
    longest = DEFAULT_ANSWER_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens
    if longest < 1:
        raise InputError(f"--max-new-tokens {longest}: it must be 1 or more")
    pattern = answer_pattern(GSM8K_ANSWER if arguments.answer is None else arguments.answer)
    opened = open_model(arguments.model)
    tokenizer = opened.load_tokenizer()
    questions = read_questions(file, tokenizer, vocab_size=opened.config.vocab_size)
    decoder = Decoder.load(opened.source, opened.model, dtype=arguments.dtype, decode_weights="once")
    with console_reporter() as reporter:
        found = exact_match(
            decoder,
            tokenizer,
            questions,
            pattern=pattern,
            max_new_tokens=longest,
            batch_size=arguments.batch_size,
            stop_tokens=stop_tokens(opened.config, tokenizer),
            reporter=reporter,
        )
    text = (
        f"exact match {found.accuracy:.4f} ({found.correct} of {found.questions} questions, {found.unanswered} without "
        f"an answer; {found.seconds:.1f} s)"
    )
    fields = {**dataclasses.asdict(found), "exact_match": found.accuracy, "model": opened.name, "file": file}
    return Result(text, fields)


def describe(measured: Perplexity) -> str:
    """Returns one line for a person."""
    rate = measured.windows * measured.context / max(measured.seconds, 1e-9)
    return (
        f"perplexity {measured.perplexity:.4f} ({measured.tokens:,} tokens scored in {measured.windows} windows of "
        f"{measured.context}; {measured.seconds:.1f} s, {rate:,.0f} tokens/s)"
    )
