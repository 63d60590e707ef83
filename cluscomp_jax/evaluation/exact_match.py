"""How many questions a model answers exactly: by the likeliest tokens, the answer compared as a string.

As GSM8K is scored (Cobbe et al., 2021, arXiv 2110.14168). Knows a Decoder and a tokenizer, no files.
"""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from cluscomp_jax.errors import InputError
from cluscomp_jax.inference.completion import complete
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.text.token_rows import Question

GSM8K_ANSWER = r"####\s*([^\n]*)"
"""What follows the four signs that close an answer of GSM8K."""


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """What was answered.

    Attributes:
      questions: how many were asked.
      correct: how many answers are those expected.
      unanswered: in how many texts the pattern found nothing; they are not correct.
      seconds: wall time.
    """

    questions: int
    correct: int
    unanswered: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """The share of correct answers."""
        return self.correct / self.questions


def extract_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """Returns the last match of `pattern`: its first group, if it has one; less spaces, commas, "$" and a last dot.

    None where nothing matches, or nothing is left.
    """
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    chosen = matches[-1].group(1 if pattern.groups else 0) or ""
    return re.sub(r"[\s,$]", "", chosen).removesuffix(".") or None


def answer_pattern(expression: str) -> re.Pattern[str]:
    """Returns the compiled expression. Raises InputError if it is none."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise InputError(f"answer pattern {expression!r} is no regular expression: {error}") from None


def exact_match(
    decoder: Decoder,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    pattern: re.Pattern[str],
    max_new_tokens: int,
    batch_size: int,
    stop_tokens: Sequence[int] = (),
    reporter: Reporter | None = None,
) -> ExactMatch:
    """Returns how many questions are answered as expected by the most likely tokens.

    Args:
      decoder: the model.
      tokenizer: of transformers.
      questions: at least one.
      pattern: takes the answer out of what was generated and out of what was expected, as `extract_answer`.
      max_new_tokens: longest text of an answer, >= 1.
      batch_size: questions at a time, >= 1; changes the speed, and results within rounding.
      stop_tokens: end an answer.
      reporter: receives progress; silent by default.

    Raises:
      InputError: an expected answer that the pattern finds nothing in, or a prompt too long for the model.
    """
    began, reporter = time.monotonic(), reporter or SilentReporter()
    expected = [extract_answer(question.answer, pattern) for question in questions]
    if None in expected:
        where = questions[expected.index(None)].where
        raise InputError(f"{where}: {pattern.pattern!r} finds no answer in what is expected; give another pattern")
    reporter.start("exact match", len(questions), "questions")
    given: list[str | None] = []
    for begin in range(0, len(questions), batch_size):
        completions, _ = complete(
            decoder,
            tokenizer,
            [question.prompt for question in questions[begin : begin + batch_size]],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(),
            key=jax.random.key(0),
            stop_tokens=stop_tokens,
        )
        given += [extract_answer(completion.text, pattern) for completion in completions]
        reporter.advance(len(completions))
    correct = sum(ours == theirs for ours, theirs in zip(given, expected, strict=True))
    return ExactMatch(len(questions), correct, given.count(None), time.monotonic() - began)
