"""From prompts in tokens to completions in text: stop tokens, stop strings, streaming, and what it took.

Knows a Decoder and a tokenizer of transformers, no command line.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.inference.decoder import Decoder, checked_prompts
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.text.text_stream import TextStream

_COMPILING = ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    Attributes:
      text: without the stop string.
      tokens: as drawn, stop token included.
      stop: why it ended: a stop token, a stop string, or its length.
    """

    text: str
    tokens: list[int]
    stop: Literal["token", "string", "length"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What generation took, prefill and decoding apart, compilation in neither.

    Attributes:
      prefill_tokens: of all prompts together.
      prefill_seconds: up to the first new token of each.
      decode_tokens: drawn after the first, of all rows until the last one ended.
      decode_seconds: for those.
      compile_seconds: spent in the compiler.
    """

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens per second."""
        return self.decode_tokens / max(self.decode_seconds, 1e-9)


def complete(
    decoder: Decoder,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> tuple[list[Completion], Rates]:
    """Returns the completion of every prompt and what they took; all end together, each at its own stop.

    Args:
      decoder: the model.
      tokenizer: of transformers.
      prompts: int [t] each, lengths may differ.
      max_new_tokens: >= 1, for each.
      sampling: how tokens are drawn.
      key: of the draws; the same key gives the same tokens.
      stop_tokens: end a row and are not in its text.
      stop_strings: end a row before them.
      on_text: called with (row, text) whenever more text of a row is certain.

    Raises:
      InputError: an empty stop string, or as `checked_prompts`.
    """
    if "" in stop_strings:
        raise InputError("a stop string is empty; leave it out")
    checked = checked_prompts(list(prompts), decoder.model, max_new_tokens)
    rows = [_Row(TextStream(tokenizer, stop_strings), frozenset(stop_tokens)) for _ in checked]
    marks: list[tuple[float, float]] = []
    with _compile_seconds() as compiling:
        began = time.perf_counter()
        for column in decoder.stream(checked, max_new_tokens, sampling, key):
            drawn = np.asarray(column).tolist()
            marks.append((time.perf_counter() - began, compiling[0]))
            for i, (row, token) in enumerate(zip(rows, drawn, strict=True)):
                text = row.push(token)
                if text and on_text is not None:
                    on_text(i, text)
            if all(row.stop for row in rows):
                break
    for i, row in enumerate(rows):
        text = row.close()
        if text and on_text is not None:
            on_text(i, text)
    return [Completion(row.stream.text, row.tokens, row.stop or "length") for row in rows], _rates(checked, marks)


@dataclasses.dataclass
class _Row:
    """One sequence under way; `stop` is None until it has ended."""

    stream: TextStream
    stop_tokens: frozenset[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    stop: Literal["token", "string"] | None = None

    def push(self, token: int) -> str:
        if self.stop:
            return ""
        self.tokens.append(token)
        if token in self.stop_tokens:
            self.stop = "token"
            return ""
        text = self.stream.push(token)
        if self.stream.stopped:
            self.stop = "string"
        return text

    def close(self) -> str:
        return self.stream.close()


def _rates(prompts: Sequence[np.ndarray], marks: Sequence[tuple[float, float]]) -> Rates:
    """Returns the rates; `marks` are (seconds, of them in the compiler) at each new column."""
    first, last = marks[0], marks[-1]
    return Rates(
        prefill_tokens=sum(len(prompt) for prompt in prompts),
        prefill_seconds=max(0.0, first[0] - first[1]),
        decode_tokens=len(prompts) * (len(marks) - 1),
        decode_seconds=max(0.0, (last[0] - first[0]) - (last[1] - first[1])),
        compile_seconds=last[1],
    )


@contextmanager
def _compile_seconds() -> Iterator[list[float]]:
    """Yields [seconds that JAX has spent compiling inside the block so far]."""
    spent = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILING:
            spent[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
