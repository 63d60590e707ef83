"""Answers taken out of texts, questions of files, and a model that is asked them."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli_models import write_model

from cluscomp_jax.cli import main
from cluscomp_jax.config.settings import DataConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.exact_match import GSM8K_ANSWER, answer_pattern, exact_match, extract_answer
from cluscomp_jax.inference.completion import complete
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.io.open import open_model
from cluscomp_jax.text.token_rows import Question
from cluscomp_jax.text.training_data import read_examples, read_questions


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("6 * 7 = 42\n#### 42", GSM8K_ANSWER, "42"),
        ("#### 1\nno:\n#### $1,234.\nQ: #", GSM8K_ANSWER, "1234"),
        ("####   \n", GSM8K_ANSWER, None),
        ("forty-two", GSM8K_ANSWER, None),
        ("it is 12 or 13", r"-?\d+", "13"),
        ("A) x  B) y", r"([A-D])\)", "B"),
        ("yes", r"(no)|yes", None),
    ],
)
def test_the_last_match_is_the_answer(text: str, pattern: str, expected: str | None) -> None:
    assert extract_answer(text, re.compile(pattern)) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("exact") / "model")


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_prompt_is_what_stands_before_the_answer_in_training(folder: Path, tmp_path: Path) -> None:
    tokenizer = open_model(folder).load_tokenizer()
    file = write_lines(tmp_path / "q.jsonl", {"question": "how many?", "answer": "three"})
    (question,) = read_questions(file, tokenizer, vocab_size=40)
    rows = read_examples(file, tokenizer, DataConfig(length=80, responses_only=True), vocab_size=40)
    first = int(np.flatnonzero(rows.loss_mask[0])[0])
    np.testing.assert_array_equal(question.prompt, rows.tokens[0, :first])
    assert (question.answer, question.where) == ("three", f"{file} line 1")


def greedy_text(folder: Path, prompt: np.ndarray, tokens: int) -> str:
    opened = open_model(folder)
    decoder = Decoder.load(opened.source, opened.model, dtype="float32", decode_weights="once")
    tokenizer = opened.load_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": tokens, "sampling": Sampling(), "key": jax.random.key(0)}
    (completion,), _ = complete(decoder, tokenizer, [prompt], **options)
    return completion.text


def test_the_model_is_right_where_it_says_what_is_expected(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"instruction": text, "output": "x"} for text in ("what now?", "and then?", "why not, again?")]
    tokenizer = open_model(folder).load_tokenizer()
    prompts = [
        question.prompt
        for question in read_questions(write_lines(tmp_path / "q.jsonl", *asked), tokenizer, vocab_size=40)
    ]
    texts = [greedy_text(folder, prompt, 5) for prompt in prompts]
    pattern = r"(?s)^(.+)$"
    assert all(extract_answer(text, re.compile(pattern)) for text in texts)
    outputs = [texts[0], texts[1] + "z", texts[2]]
    file = write_lines(
        tmp_path / "a.jsonl", *({**line, "output": text} for line, text in zip(asked, outputs, strict=True))
    )
    argv = ["evaluate", str(folder), "--exact-match", str(file), "--answer", pattern, "--max-new-tokens", "5"]
    for batch_size in ("1", "2"):
        assert main([*argv, "--batch-size", batch_size, "--json"]) == 0
        fields = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (fields["questions"], fields["correct"], fields["unanswered"]) == (3, 2, 0)
        assert fields["exact_match"] == pytest.approx(2 / 3)
    assert main([*argv[:4], "--answer", "[a-z]*9|x|z", "--max-new-tokens", "5"]) == 2
    assert "finds no answer in what is expected" in capsys.readouterr().err


def test_a_text_without_an_answer_counts_as_wrong(folder: Path) -> None:
    opened = open_model(folder)
    decoder = Decoder.load(opened.source, opened.model, dtype="float32", decode_weights="once")
    found = exact_match(
        decoder,
        opened.load_tokenizer(),
        [Question(np.array([3, 4, 5]), "#### 7", "line 1")],
        pattern=answer_pattern(GSM8K_ANSWER),
        max_new_tokens=3,
        batch_size=4,
    )
    assert (found.questions, found.correct, found.unanswered, found.accuracy) == (1, 0, 1, 0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "give --text TEXT or --exact-match FILE"),
        (["--text", "t", "--exact-match", "f"], "--text t has no effect with --exact-match"),
        (["--text", "t", "--max-new-tokens", "3"], "--max-new-tokens has no effect without --exact-match"),
        (["--exact-match", "f", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--exact-match", "f", "--answer", "("], "is no regular expression"),
        (["--exact-match", "none.jsonl"], "cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    assert main(["evaluate", str(folder), *options]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "text"),
    [({"text": "a"}, "which asks nothing"), ({"question": "a", "answer": 3}, "'answer' is a int")],
)
def test_lines_that_ask_nothing_are_refused(folder: Path, tmp_path: Path, line: dict[str, Any], text: str) -> None:
    file = write_lines(tmp_path / "q.jsonl", line)
    with pytest.raises(InputError, match=text):
        read_questions(file, open_model(folder).load_tokenizer(), vocab_size=40)
