"""Files to train on: running text, and JSON lines of texts, instructions or conversations, as rows of tokens.

A line of JSON holds {"text"}, {"instruction", "input" (may be missing), "output"}, {"question", "answer"} or
{"messages"}, all lines of a file the same; other keys are not read. Knows no model and no training.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from cluscomp_jax.config.settings import DataConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer import encode_text, start_tokens
from cluscomp_jax.text.text import Split, check_vocabulary, load_tokens
from cluscomp_jax.text.token_rows import Question, TokenRows, pack, pad

_FORMS = {
    "text": ("text",),
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
}
_TABLES = (".csv", ".tsv", ".parquet")
_HEADINGS = {"instruction": "### Instruction:\n", "input": "### Input:\n", "output": "### Response:\n"}
"""What precedes the parts of an instruction where the tokenizer has no chat template."""


class _Line(NamedTuple):
    """One line of a file: its number from 1, its name in messages, the object it holds."""

    number: int
    where: str
    fields: Mapping[str, Any]


class _Conversation(NamedTuple):
    """A conversation as one text.

    Attributes:
      spans: (begin, end) characters of what the assistant says.
      templated: whether a chat template wrote it, which then also wrote its first and last special tokens.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    templated: bool


def read_examples(
    spec: str | Path, tokenizer: Any, settings: DataConfig, *, vocab_size: int, split: Split = "train"
) -> TokenRows:
    """Returns the rows of a file or of a named data set.

    Args:
      spec: .jsonl or .jsonl.gz, read as above; anything else as `cluscomp_jax.text.text.load_tokens` reads it. Texts of
        JSON lines follow one another, the tokenizer's end token between them, and are cut as one.
      tokenizer: of transformers; not used for .npy and may then be None.
      settings: the length of rows, and what is scored of conversations.
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
        _refuse_responses(settings, path)
        tokens = load_tokens(spec, tokenizer, split=split, vocab_size=vocab_size)
        examples = _packed(tokens, settings.length, path)
    check_vocabulary(examples.tokens, vocab_size, where=str(spec))
    return examples


def holds_json_lines(path: Path) -> bool:
    """Returns whether a file is read as JSON lines, by its name; else it is running text.

    Raises:
      InputError: by its name it is JSON in another form, or a table.
    """
    name = path.name.lower()
    if name.endswith((".json", ".json.gz")):
        raise InputError(f"{path}: is JSON; give JSON lines (.jsonl), one object a line")
    if name.removesuffix(".gz").endswith(_TABLES):
        raise InputError(f"{path}: is a table; give text, or JSON lines (.jsonl), one object a line")
    return name.endswith((".jsonl", ".jsonl.gz"))


def _read_lines(path: Path, tokenizer: Any, settings: DataConfig) -> TokenRows:
    form, lines = _uniform_lines(path)
    if form == "text":
        _refuse_responses(settings, path)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = [[*encode_text(tokenizer, _string(where, fields, "text")), *end] for _, where, fields in lines]
        return _packed(np.concatenate([np.asarray(text, np.int32) for text in texts]), settings.length, path)
    rows = {line.number: _row(line, tokenizer, settings, _RENDERERS[form]) for line in lines}
    kept = {number: row for number, row in rows.items() if row is not None}
    if not kept:
        raise InputError(f"{path}: every conversation is longer than {settings.length} tokens; raise the length")
    return pad(list(kept.values()), settings.length, np.fromiter(kept, np.int64))


def _uniform_lines(path: Path) -> tuple[str, list[_Line]]:
    """Returns the form of all lines of a file, and the lines."""
    lines = list(_objects(path))
    if not lines:
        raise InputError(f"{path} holds no lines; give one JSON object a line")
    form = _form(lines[0].where, lines[0].fields)
    for _, where, fields in lines:
        if (other := _form(where, fields)) != form:
            raise InputError(f"{where}: holds {other!r}, the first line {form!r}; keep one form in a file")
    return form, lines


def read_questions(path: str | Path, tokenizer: Any, *, vocab_size: int) -> list[Question]:
    """Returns the conversations of a file of JSON lines up to their last answers, as `read_examples` would write them.

    Args:
      path: .jsonl or .jsonl.gz of instructions, questions or messages.
      tokenizer: of transformers.
      vocab_size: of the model; every token must be below it.

    Raises:
      InputError: as `read_examples`; or a file of texts, or a conversation that does not end with the assistant.
    """
    form, lines = _uniform_lines(Path(path))
    if form == "text":
        raise InputError(f"{path} is running text, which asks nothing; give instructions, questions or messages")
    questions = []
    for _, where, fields in lines:
        conversation = _RENDERERS[form](where, fields, tokenizer, with_spans=True)
        if form == "messages" and fields["messages"][-1]["role"] != "assistant":
            raise InputError(
                f"{where}: ends with {fields['messages'][-1]['role']!r}; the answer must be the last message"
            )
        answer = fields["messages"][-1]["content"] if form == "messages" else fields[_FORMS[form][1]]
        prompt = conversation.text[: conversation.spans[-1][0]]
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.asarray([*([] if conversation.templated else start_tokens(tokenizer)), *ids], np.int32)
        check_vocabulary(tokens, vocab_size, where=where)
        questions.append(Question(tokens, answer, where))
    return questions


def _refuse_responses(settings: DataConfig, path: Path) -> None:
    if settings.responses_only:
        raise InputError(f"{path} is running text, which has no responses; leave responses_only out")


def _packed(tokens: np.ndarray, length: int, path: Path) -> TokenRows:
    try:
        return pack(tokens, length)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _column(error: Exception) -> str:
    return f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""


def _objects(path: Path) -> Iterator[_Line]:
    """Yields every line that is not blank."""
    try:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: is not JSON: {getattr(error, 'msg', error)}{_column(error)}") from None
        if not isinstance(fields, dict):
            raise InputError(f"{where}: is a {type(fields).__name__}; it must be an object")
        yield _Line(number, where, fields)


def _form(where: str, fields: Mapping[str, Any]) -> str:
    found = [form for form, keys in _FORMS.items() if all(key in fields for key in keys)]
    if len(found) != 1:
        keys = ", ".join(sorted(fields)[:6])
        raise InputError(
            f"{where}: has the keys {keys or 'none'}; it must have one of: text; instruction and output; question and "
            "answer; messages"
        )
    return found[0]


def _string(where: str, fields: Mapping[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is a {type(value).__name__}; it must be a string")
    _require_unicode(where, value)
    return value


def _require_unicode(where: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half a surrogate pair ({value[error.start]!r}), which is no text") from None


def _row(
    line: _Line,
    tokenizer: Any,
    settings: DataConfig,
    render: Callable[..., _Conversation],
) -> tuple[list[int], list[bool]] | None:
    """Returns (tokens, scored) of a conversation; None where it is skipped."""
    where = line.where
    conversation = render(where, line.fields, tokenizer, with_spans=settings.responses_only)
    ids, loss_mask = _encode(where, conversation, tokenizer, responses_only=settings.responses_only)
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
        raise InputError(f"{where}: none of its first {settings.length} tokens is a response to score; take it out")
    return ids, loss_mask


def _encode(
    where: str, conversation: _Conversation, tokenizer: Any, *, responses_only: bool
) -> tuple[list[int], list[bool]]:
    if not getattr(tokenizer, "is_fast", False) and responses_only:
        raise InputError(f"{where}: this tokenizer does not say which characters a token covers; score all tokens")
    encoded = tokenizer(
        conversation.text, add_special_tokens=False, return_offsets_mapping=responses_only, verbose=False
    )
    ids = list(encoded["input_ids"])
    loss_mask = [True] * len(ids)
    if responses_only:
        # A token that begins before the response belongs to the prompt: generation could not have produced it.
        loss_mask = [any(a <= begin < b for a, b in conversation.spans) for begin, _ in encoded["offset_mapping"]]
    if conversation.templated:
        return ids, loss_mask
    first, last = start_tokens(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*first, *ids, *last], [*([False] * len(first)), *loss_mask, *([True] * len(last))]


def _render_instruction(where: str, fields: Mapping[str, Any], tokenizer: Any, *, with_spans: bool) -> _Conversation:
    parts = {key: _string(where, fields, key) for key in _HEADINGS if fields.get(key)}
    if "output" not in parts or "instruction" not in parts:
        raise InputError(f"{where}: 'instruction' or 'output' is empty; take the line out")
    output = parts.pop("output")
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": "\n\n".join(parts.values())}, {"role": "assistant", "content": output}]
        return _render_messages(where, {"messages": said}, tokenizer, with_spans=with_spans)
    prompt = "".join(f"{_HEADINGS[key]}{text}\n\n" for key, text in parts.items()) + _HEADINGS["output"]
    return _Conversation(prompt + output, ((len(prompt), len(prompt) + len(output)),), False)


def _render_question(where: str, fields: Mapping[str, Any], tokenizer: Any, *, with_spans: bool) -> _Conversation:
    named = {"instruction": _string(where, fields, "question"), "output": _string(where, fields, "answer")}
    return _render_instruction(where, named, tokenizer, with_spans=with_spans)


def _render_messages(where: str, fields: Mapping[str, Any], tokenizer: Any, *, with_spans: bool) -> _Conversation:
    messages = fields["messages"]
    _check_messages(where, messages)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: holds messages, but the model's tokenizer has no chat template; use 'text'")
    text = _apply(where, tokenizer, messages, prompt=False)
    if not with_spans:
        return _Conversation(text, (), True)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InputError(f"{where}: begins with the assistant, who answers nothing; put a user's message before it")
        before = _apply(where, tokenizer, messages[:i], prompt=True)
        after = _apply(where, tokenizer, messages[: i + 1], prompt=False)
        if not after.startswith(before) or not text.startswith(after):
            raise InputError(
                f"{where}: the chat template writes message {i + 1} differently when others follow, so its place is "
                "not known; score all tokens"
            )
        spans.append((len(before), len(after)))
    return _Conversation(text, tuple(spans), True)


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' must be a list of at least one message")
    for i, message in enumerate(messages, 1):
        fine = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fine:
            raise InputError(f"{where}: message {i} must be an object with the strings 'role' and 'content'")
        _require_unicode(where, message["role"] + message["content"])


def _apply(where: str, tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    except (jinja2.TemplateError, IndexError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{where}: the chat template refuses these messages: {reason}") from None


_RENDERERS: Mapping[str, Callable[..., _Conversation]] = {
    "instruction": _render_instruction,
    "question": _render_question,
    "messages": _render_messages,
}
