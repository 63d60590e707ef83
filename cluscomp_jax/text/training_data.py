"""Files to train on: running text, and JSON lines of texts, instructions or conversations, as rows of tokens.

`json_lines` says what a line may hold. Knows no model and no training.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer import start_tokens
from cluscomp_jax.text.json_lines import (
    FORMS,
    RENDERERS,
    Line,
    UnusableLineError,
    encode_conversation,
    encode_lines,
    holds_json_lines,
    uniform_lines,
)
from cluscomp_jax.text.text import Split, check_vocabulary, load_tokens
from cluscomp_jax.text.token_rows import Question, TokenRows, pack, pad


def read_examples(
    spec: str | Path, tokenizer: Any, settings: DataConfig, *, vocab_size: int, split: Split = "train"
) -> TokenRows:
    """Returns the rows of a file or of a named data set.

    Args:
      spec: .jsonl or .jsonl.gz; anything else as `cluscomp_jax.text.text.load_tokens` reads it. Texts of JSON lines
        follow one another, the tokenizer's end token between them, and are cut as one.
      tokenizer: of transformers; not used for .npy and may then be None.
      settings: the length of rows, and what becomes of conversations.
      vocab_size: of the model; every token must be below it.
      split: which part of a named data set.

    Raises:
      InputError: a file that cannot be read, a broken line (named by its number from 1), a chat template that is
        missing or fails, too little text, nothing to score, or a tokenizer of another model.
    """
    path = Path(spec)
    if holds_json_lines(path):
        examples = _read_lines(path, tokenizer, settings)
    else:
        _refuse_settings_of_conversations(settings, path)
        tokens = load_tokens(spec, tokenizer, split=split, vocab_size=vocab_size)
        examples = _packed(tokens, settings.length, path)
    check_vocabulary(examples.tokens, vocab_size, where=str(spec))
    return examples


def _read_lines(path: Path, tokenizer: Any, settings: DataConfig) -> TokenRows:
    form, lines = uniform_lines(path)
    if form == "text":
        _refuse_settings_of_conversations(settings, path)
        return _packed(encode_lines(path, tokenizer), settings.length, path)
    rows = {line.number: _row(line, form, tokenizer, settings) for line in lines}
    kept = {number: row for number, row in rows.items() if row is not None}
    if not kept:
        raise InputError(
            f"{path}: every conversation is longer than {settings.length} tokens, or unusable; raise the length"
        )
    left_out = np.fromiter((number for number in rows if number not in kept), np.int64)
    return pad(list(kept.values()), settings.length, np.fromiter(kept, np.int64), left_out)


def read_questions(path: str | Path, tokenizer: Any, *, vocab_size: int) -> list[Question]:
    """Returns the conversations of a file of JSON lines up to their last answers, as `read_examples` would write them.

    Args:
      path: .jsonl or .jsonl.gz of instructions, questions or messages.
      tokenizer: of transformers.
      vocab_size: of the model; every token must be below it.

    Raises:
      InputError: as `read_examples`; or a file of texts, or a conversation that does not end with the assistant.
    """
    form, lines = uniform_lines(Path(path))
    if form == "text":
        raise InputError(f"{path} is running text, which asks nothing; give instructions, questions or messages")
    questions = []
    for _, where, fields in lines:
        conversation = RENDERERS[form](where, fields, tokenizer, with_spans=True)
        if form == "messages" and fields["messages"][-1]["role"] != "assistant":
            raise InputError(
                f"{where}: ends with {fields['messages'][-1]['role']!r}; the answer must be the last message"
            )
        answer = fields["messages"][-1]["content"] if form == "messages" else fields[FORMS[form][1]]
        prompt = conversation.text[: conversation.spans[-1][0]]
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.asarray([*([] if conversation.templated else start_tokens(tokenizer)), *ids], np.int32)
        check_vocabulary(tokens, vocab_size, where=where)
        questions.append(Question(tokens, answer, where))
    return questions


def _refuse_settings_of_conversations(settings: DataConfig, path: Path) -> None:
    if settings.responses_only:
        raise InputError(f"{path} is running text, which has no responses; leave responses_only out")
    for name in ("too_long", "unusable"):
        if (value := getattr(settings, name)) != "refuse":
            raise InputError(f"{path} is running text, on which {name} {value!r} has no effect; leave it out")


def _packed(tokens: np.ndarray, length: int, path: Path) -> TokenRows:
    try:
        return pack(tokens, length)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _row(line: Line, form: str, tokenizer: Any, settings: DataConfig) -> tuple[list[int], list[bool]] | None:
    """Returns (tokens, scored) of a conversation; None where it is left out."""
    try:
        return _usable_row(line, form, tokenizer, settings)
    except UnusableLineError as error:
        if settings.unusable == "skip":
            return None
        raise InputError(f"{error}, or set unusable to 'skip'") from None


def _usable_row(line: Line, form: str, tokenizer: Any, settings: DataConfig) -> tuple[list[int], list[bool]] | None:
    where = line.where
    conversation = RENDERERS[form](where, line.fields, tokenizer, with_spans=settings.responses_only)
    ids, loss_mask = encode_conversation(where, conversation, tokenizer, responses_only=settings.responses_only)
    if len(ids) > settings.length:
        if settings.too_long == "skip":
            return None
        if settings.too_long == "refuse":
            raise InputError(
                f"{where}: has {len(ids)} tokens, a row {settings.length}; raise the length, or set too_long to "
                "'cut' or 'skip'"
            )
    ids, loss_mask = ids[: settings.length], loss_mask[: settings.length]
    if not any(loss_mask[1:]):
        raise UnusableLineError(
            f"{where}: none of its first {settings.length} tokens is a response to score; take it out"
        )
    return ids, loss_mask
