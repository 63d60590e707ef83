"""JSON lines of texts, instructions, questions or conversations: their forms, and how a tokenizer writes them.

A line holds {"messages"}, {"instruction", "input" (may be missing), "output"}, {"question", "answer"} or {"text"}. Of a
line with the keys of several, the first of these in this order is read, so that a "text" that repeats an instruction is
not. All lines of a file have one form; other keys are not read. Knows no rows and no training.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer import encode_text, start_tokens
from cluscomp_jax.runtime.extras import needed_for

FORMS = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "text": ("text",),
}
"""{form: keys it is known by}, in order of precedence."""
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a chat template raises besides jinja2's own errors."""
_TABLES = (".csv", ".tsv", ".parquet")
_HEADINGS = {"instruction": "### Instruction:\n", "input": "### Input:\n", "output": "### Response:\n"}
"""What precedes the parts of an instruction where the tokenizer has no chat template."""


class Line(NamedTuple):
    """One line of a file: its number from 1, its name in messages, the object it holds."""

    number: int
    where: str
    fields: Mapping[str, Any]


class Conversation(NamedTuple):
    """A conversation as one text.

    Attributes:
      spans: (begin, end) characters of what the assistant says.
      templated: whether a chat template wrote it, which then also wrote its first and last special tokens.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    templated: bool


class UnusableLineError(InputError):
    """A line of a known form that nothing can be learnt from: a part is empty, or nothing of it is to be scored."""


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


def uniform_lines(path: Path) -> tuple[str, list[Line]]:
    """Returns the form of all lines of a file, and the lines."""
    lines = list(_objects(path))
    if not lines:
        raise InputError(f"{path} holds no lines; give one JSON object a line")
    form = _form(lines[0].where, lines[0].fields)
    for _, where, fields in lines:
        if (other := _form(where, fields)) != form:
            raise InputError(f"{where}: holds {other!r}, the first line {form!r}; keep one form in a file")
    return form, lines


def _column(error: Exception) -> str:
    return f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""


def _objects(path: Path) -> Iterator[Line]:
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
        yield Line(number, where, fields)


def _form(where: str, fields: Mapping[str, Any]) -> str:
    found = [form for form, keys in FORMS.items() if all(key in fields for key in keys)]
    if not found:
        keys = ", ".join(sorted(fields)[:6])
        raise InputError(
            f"{where}: has the keys {keys or 'none'}; it must have one of: text; instruction and output; question and "
            "answer; messages"
        )
    return found[0]


def read_string(where: str, fields: Mapping[str, Any], key: str) -> str:
    """Returns the text of a key; raises InputError where it is none."""
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


def encode_lines(path: Path, tokenizer: Any) -> np.ndarray:
    """Returns the tokens int32 [t] of all lines of a file, one after the other.

    Each text begins with the tokenizer's start tokens and ends with its end token; a conversation is written as for
    training.

    Raises:
      InputError: a file that cannot be read, a broken or unusable line (named by its number from 1), or a chat template
        that is missing or fails.
    """
    form, lines = uniform_lines(path)
    encoded = []
    for _, where, fields in lines:
        if form == "text":
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids = [*encode_text(tokenizer, read_string(where, fields, "text")), *end]
        else:
            conversation = RENDERERS[form](where, fields, tokenizer, with_spans=False)
            ids, _ = encode_conversation(where, conversation, tokenizer, responses_only=False)
        encoded.append(np.asarray(ids, np.int32))
    return np.concatenate(encoded)


def encode_conversation(
    where: str, conversation: Conversation, tokenizer: Any, *, responses_only: bool
) -> tuple[list[int], list[bool]]:
    """Returns (tokens, whether each is scored) of a conversation, with its first and last special tokens."""
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


def _render_instruction(where: str, fields: Mapping[str, Any], tokenizer: Any, *, with_spans: bool) -> Conversation:
    parts = {key: read_string(where, fields, key) for key in _HEADINGS if fields.get(key)}
    if "output" not in parts or "instruction" not in parts:
        raise UnusableLineError(f"{where}: 'instruction' or 'output' is empty; take the line out")
    output = parts.pop("output")
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": "\n\n".join(parts.values())}, {"role": "assistant", "content": output}]
        return _render_messages(where, {"messages": said}, tokenizer, with_spans=with_spans)
    prompt = "".join(f"{_HEADINGS[key]}{text}\n\n" for key, text in parts.items()) + _HEADINGS["output"]
    return Conversation(prompt + output, ((len(prompt), len(prompt) + len(output)),), False)


def _render_question(where: str, fields: Mapping[str, Any], tokenizer: Any, *, with_spans: bool) -> Conversation:
    named = {"instruction": read_string(where, fields, "question"), "output": read_string(where, fields, "answer")}
    return _render_instruction(where, named, tokenizer, with_spans=with_spans)


def _render_messages(where: str, fields: Mapping[str, Any], tokenizer: Any, *, with_spans: bool) -> Conversation:
    messages = fields["messages"]
    _check_messages(where, messages)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: holds messages, but the model's tokenizer has no chat template; use 'text'")
    text = apply_chat_template(where, tokenizer, messages, prompt=False)
    if not with_spans:
        return Conversation(text, (), True)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InputError(f"{where}: begins with the assistant, who answers nothing; put a user's message before it")
        before = apply_chat_template(where, tokenizer, messages[:i], prompt=True)
        after = apply_chat_template(where, tokenizer, messages[: i + 1], prompt=False)
        if not after.startswith(before) or not text.startswith(after):
            raise InputError(
                f"{where}: the chat template writes message {i + 1} differently when others follow, so its place is "
                "not known; score all tokens"
            )
        spans.append((len(before), len(after)))
    return Conversation(text, tuple(spans), True)


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' must be a list of at least one message")
    for i, message in enumerate(messages, 1):
        fine = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fine:
            raise InputError(f"{where}: message {i} must be an object with the strings 'role' and 'content'")
        _require_unicode(where, message["role"] + message["content"])


def apply_chat_template(where: str, tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    """Returns the text of some messages.

    Args:
      where: names them for a person.
      tokenizer: with a chat template.
      messages: {"role", "content"} each.
      prompt: whether the assistant's turn begins after them.

    Raises:
      InputError: the template refuses them; the extra `hf` is missing.
    """
    with needed_for("a chat template", "hf"):
        import jinja2
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{where}: the chat template refuses these messages: {reason}") from None


RENDERERS: Mapping[str, Callable[..., Conversation]] = {
    "instruction": _render_instruction,
    "question": _render_question,
    "messages": _render_messages,
}
"""{form: (where, fields, tokenizer, *, with_spans) -> Conversation}."""
