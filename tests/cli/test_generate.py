"""`generate` on the command line: batches, stops, streaming, caches, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluscomp_jax.cli import main


def succeed(capsys: pytest.CaptureFixture[str], model: Path, *argv: str) -> tuple[list[str], dict[str, Any]]:
    code = main(["generate", str(model), *argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    *text, last = out.splitlines()
    return text, json.loads(last)


def test_several_prompts_make_one_batch(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    prompts = ["The city of", "In the beginning there was nothing but"]
    text, fields = succeed(capsys, tiny_model, "--prompt", *prompts, "--max-new-tokens", "6")
    whole = "\n".join(text).split("\n---\n")
    for prompt, row, shown in zip(prompts, fields["completions"], whole, strict=True):
        assert shown == prompt + row["completion"]
        assert row["new_tokens"] == 6
        _, alone = succeed(capsys, tiny_model, "--prompt", prompt, "--max-new-tokens", "6")
        assert alone["completion"] == row["completion"]
    assert fields["prefill_tokens"] == sum(row["prompt_tokens"] for row in fields["completions"])
    assert fields["prefill_tokens_per_second"] > 0 < fields["decode_tokens_per_second"]


def test_a_stream_prints_what_is_returned(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    argv = ["--prompt", "The city of", "--max-new-tokens", "8", "--cache", "int8", "--repetition-penalty", "1.3"]
    text, fields = succeed(capsys, tiny_model, *argv, "--stream")
    assert "\n".join(text) == "The city of" + fields["completion"]
    assert succeed(capsys, tiny_model, *argv)[1]["completion"] == fields["completion"]


def test_a_stop_string_ends_it(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    argv = ["--prompt", "The city of", "--max-new-tokens", "8"]
    free = succeed(capsys, tiny_model, *argv)[1]["completion"]
    _, fields = succeed(capsys, tiny_model, *argv, "--stop", free[5:8], "never seen")
    assert fields["completion"] == free[: free.index(free[5:8])]
    assert fields["stop"] == "string"


REFUSED: dict[str, tuple[list[str], str]] = {
    "a stream of several": (["--prompt", "a", "b", "--stream"], "--stream shows one completion"),
    "a system message without chat": (["--prompt", "a", "--system", "b"], "--system has no effect"),
    "no chat template": (["--prompt", "a", "--chat"], "has no chat template"),
    "a seed without draws": (["--prompt", "a", "--seed", "1"], "--seed 1 has no effect at --temperature 0"),
    "an empty prompt": (["--prompt", ""], "--prompt is empty"),
    "draws without a temperature": (["--prompt", "a", "--top-k", "4"], "--top-k 4 has no effect at --temperature 0"),
    "min_p": (["--prompt", "a", "--temperature", "1", "--min-p", "2"], "min_p is 2"),
    "too long": (["--prompt", "a", "--max-new-tokens", "300"], "the model's context of 256"),
    "too long a prompt": (["--prompt", "city " * 400], "exceed the model's context of 256"),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_named(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, argv: list[str], message: str
) -> None:
    assert main(["generate", str(tiny_model), *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1]
    assert out == ""


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system') }}", "{{ 1 // 0 }}", "{% for", "{{ messages[9].content }}", "{{ x.y.z }}"],
)
def test_a_chat_template_that_fails_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, template: str
) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(template)
    assert main(["generate", str(tmp_path), "--prompt", "a", "--chat"]) == 2
    assert "--chat: the chat template refuses these messages" in capsys.readouterr().err.splitlines()[-1]
