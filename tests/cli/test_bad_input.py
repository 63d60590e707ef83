"""Every wrong input ends with one line that names it, exit code 2, and nothing written."""

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import tensors, write_model, write_text, write_tokenizer
from io_models import config_fields, write_hf

from cluscomp_jax.cli import main

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_text(folder / "text.txt", 600)
    (folder / "empty.txt").write_text(" \n")
    return folder


def wrong(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line of a command that must be refused."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("cluscomp: error: ")]
    assert len(lines) == 1
    assert err.endswith(f"{lines[0]}\n")
    assert "Traceback" not in err
    return lines[0]


def broken_copy(path: Path, change: Callable[[dict[str, np.ndarray]], Any], **fields: Any) -> Path:
    arrays = tensors()
    change(arrays)
    write_hf(path, config_fields(**fields), arrays)
    write_tokenizer(path)
    return path


def nothing(arrays: dict[str, np.ndarray]) -> None:
    """Leaves the weights as they are."""


def poison(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    return change


def cut(path: Path) -> Path:
    broken_copy(path, nothing)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return path


def without_weights(path: Path) -> Path:
    broken_copy(path, nothing)
    (path / "model.safetensors").unlink()
    return path


def without_a_shard(path: Path) -> Path:
    write_hf(path, config_fields(), tensors(), shards=2)
    write_tokenizer(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    return path


MODELS: dict[str, tuple[Change, list[str]]] = {
    "missing safetensors": (without_weights, ["safetensors"]),
    "truncated safetensors": (cut, ["model.safetensors"]),
    "missing shard": (without_a_shard, ["model-00002-of-00002.safetensors"]),
    "missing tensor": (lambda p: broken_copy(p, lambda a: a.pop("model.norm.weight")), ["model.norm.weight"]),
    "unused tensor": (lambda p: broken_copy(p, lambda a: a.update(x=np.zeros(1, np.float32))), ["tensor x "]),
    "NaN": (lambda p: broken_copy(p, poison(np.nan)), ["model.layers.1.mlp.down_proj.weight"]),
    "infinity": (lambda p: broken_copy(p, poison(np.inf)), ["model.layers.1.mlp.down_proj.weight"]),
    "another shape": (lambda p: broken_copy(p, nothing, intermediate_size=104), ["96", "104"]),
    "unknown model_type": (lambda p: broken_copy(p, nothing, model_type="gpt2"), ["'gpt2'", "llama"]),
    "a folder of nothing": (lambda p: p.mkdir(), ["config.json"]),
    "no folder": (lambda p: p, ["broken"]),
}


@pytest.mark.parametrize(("make", "named"), MODELS.values(), ids=MODELS)
def test_a_broken_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, make: Change, named: list[str]) -> None:
    make(tmp_path / "broken")
    out = tmp_path / "out"
    line = wrong(capsys, ["compress", str(tmp_path / "broken"), "--out", str(out), "--g", "4", "--num-codes", "4"])
    assert all(name in line for name in named), line
    assert not out.exists()


OPTIONS: dict[str, tuple[str, list[str]]] = {
    "no codes": ("--num-codes 0", ["num_codes is 0", "65536"]),
    "too many codes": ("--num-codes 65537", ["num_codes is 65537", "65536"]),
    "windows of no whole bits": ("--num-codes 1000 --step-bits 4", ["num_codes is 1000", "power of two"]),
    "a step beyond the window": ("--num-codes 256 --step-bits 9", ["step_bits is 9", "1 to 8 for 256"]),
    "a step of the default codes": ("--step-bits 4", ["num_codes is 65500", "power of two"]),
    "a step and a budget": ("--step-bits 4 --bits 2", ["--step-bits 4", "--bits 2"]),
    "trellises for AQLM": ("--bits 2 --coding trellis --for aqlm", ["export is 'aqlm'", "trellis"]),
    "trellises without a budget": ("--coding trellis", ["coding is 'trellis'", "budget"]),
    "no group": ("--g 0", ["group_size is 0", "32"]),
    "too large a group": ("--g 33", ["group_size is 33", "32"]),
    "unreachable bits": ("--bits 0.01", ["0.01", "least"]),
    "empty text": ("--calibration {}/empty.txt", ["empty.txt"]),
    "no text": ("--calibration {}/absent.txt", ["absent.txt"]),
    "short text": ("--calibration {}/text.txt --length 601", ["600", "601"]),
    "token outside the vocabulary": ("--calibration {}/large.npy --length 8", ["40", "77"]),
    "start outside the text": (
        "--calibration {}/text.txt --length 8 --samples 1 --sample-offsets {}/far.txt",
        ["9999", "592"],
    ),
    "too few starts": (
        "--calibration {}/text.txt --length 8 --samples 2 --sample-offsets {}/far.txt",
        ["1 ", "2 samples"],
    ),
    "weighted axis in": ("--calibration {}/text.txt --length 8 --samples 2 --axis in", ["'in'", "weighted"]),
    "feedback for axis in": (
        "--calibration {}/text.txt --length 8 --samples 2 --config {}/in.toml",
        ["'in'", "feedback"],
    ),
    "short evaluation text": ("--evaluate {}/text.txt --context 601", ["600", "601"]),
    "too few evaluation tokens": ("--evaluate {}/text.txt --context 8 --tokens 601", ["600", "601"]),
    "config of no one": ("--config {}/absent.toml", ["absent.toml"]),
    "unread key": ("--config {}/key.toml", ["key.toml", "'tuning.lr'"]),
    "rule without a match": ("--config {}/rule.toml", ["'nothing.*'", "none"]),
    "more devices than there are": ("--mesh data=3", ["data=3", "takes 3 devices, there are 1"]),
    "another recipe": ("--config {}/rule.toml --recipe paper", ["'default'", "'paper'"]),
}


@pytest.mark.parametrize(("options", "named"), OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_option(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, options: str, named: list[str]
) -> None:
    (folder / "key.toml").write_text("[tuning]\nlr = 1.0")
    (folder / "rule.toml").write_text('recipe = "default"\ntuning = false\n[[cluster.rules]]\npattern = "nothing.*"')
    (folder / "in.toml").write_text(
        '[cluster]\nweighted = false\nerror_feedback = true\n[[cluster.rules]]\naxis = "in"'
    )
    (folder / "far.txt").write_text("9999\n")
    np.save(folder / "large.npy", np.full(64, 77))
    out = tmp_path / "out"
    argv = ["compress", str(folder / "model"), "--out", str(out), *options.replace("{}", str(folder)).split()]
    line = wrong(capsys, argv)
    assert all(name in line for name in named), line
    assert not out.exists()


def test_an_output_folder_that_is_somebodys(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    line = wrong(capsys, ["compress", str(folder / "model"), "--out", str(tmp_path), "--num-codes", "4"])
    assert "thesis.tex" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_output_folder_below_a_file(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    argv = ["compress", str(folder / "model"), "--out", str(tmp_path / "file" / "out"), "--num-codes", "4"]
    assert "file" in wrong(capsys, argv)


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "window of one": ("evaluate {}/model --text {}/text.txt --context 1", ["context"]),
    "no batch": ("evaluate {}/model --text {}/text.txt --context 8 --batch-size 0", ["--batch-size 0"]),
    "text shorter than a window": ("evaluate {}/model --text {}/text.txt", ["600", "2048"]),
    "fewer tokens than a window": ("evaluate {}/model --text {}/text.txt --tokens 9 --context 10", ["9", "10"]),
    "more tokens than there are": ("evaluate {}/model --text {}/text.txt --tokens 601 --context 8", ["600", "601"]),
    "empty text": ("evaluate {}/model --text {}/empty.txt", ["empty.txt"]),
    "no new tokens": ("generate {}/model --prompt a --max-new-tokens 0", ["--max-new-tokens 0"]),
    "questions of no file": ("evaluate {}/model --exact-match {}/absent.jsonl", ["absent.jsonl", "No such file"]),
    "cold": ("generate {}/model --prompt a --temperature -1", ["temperature is -1"]),
    "top_p of two": ("generate {}/model --prompt a --top-p 2", ["top_p is 2"]),
    "no chat template": ("generate {}/model --prompt a --chat", ["--chat"]),
    "inspect what is not compressed": ("inspect {}/model", ["manifest.json"]),
    "inspect nothing": ("inspect {}/absent", ["absent"]),
}


@pytest.mark.parametrize(("command", "named"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command(capsys: pytest.CaptureFixture[str], folder: Path, command: str, named: list[str]) -> None:
    line = wrong(capsys, command.replace("{}", str(folder)).split())
    assert all(name in line for name in named), line


def test_windows_beyond_the_context_are_measured_and_said(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "short", max_position_embeddings=32)
    argv = ["evaluate", str(model), "--text", str(folder / "text.txt"), "--tokens", "48"]
    assert main([*argv, "--context", "48"]) == 0
    assert "--context 48 is more than the model's own context of 32" in capsys.readouterr().err
    assert main([*argv, "--context", "24"]) == 0
    assert "own context" not in capsys.readouterr().err


def test_windows_begin_with_the_token_that_the_model_names(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "begins", bos_token_id=1)
    text, array = str(folder / "text.txt"), tmp_path / "tokens.npy"
    argv = ["evaluate", str(model), "--context", "8", "--begin-windows", "--text"]
    assert "names no token that begins a text" in wrong(capsys, [*argv, text])  # its tokenizer has none
    np.save(array, np.random.default_rng(0).integers(2, 30, 45))
    assert main([*argv, str(array)]) == 0
    out = capsys.readouterr().out
    assert "every window begins with token 1" in out
    assert "42 tokens scored in 6 windows of 8" in out
    exact = ["evaluate", str(model), "--exact-match", text, "--begin-windows"]
    assert "--begin-windows has no effect with --exact-match" in wrong(capsys, exact)


def test_what_a_compression_will_be_like_is_said_before_it_begins(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    """More codes than the matrices are worth; samples and windows beyond the context."""
    model = write_model(tmp_path / "short", max_position_embeddings=32)
    text = str(folder / "text.txt")
    argv = ["compress", str(model), "--no-tuning", "--g", "4", "--evaluate", text, "--context", "48"]
    assert main([*argv, "--num-codes", "4000", "--tokens", "48", "--out", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"\d\d\.\d bits per weight: the codebooks weigh more than the matrices", said)
    assert "--context 48 is more than the model's own context of 32" in said
    few = ["--num-codes", "4", "--calibration", text, "--samples", "1", "--length", "40"]
    assert main(["compress", str(model), "--no-tuning", "--g", "4", *few, "--out", str(tmp_path / "p")]) == 0
    said = capsys.readouterr().err
    assert "--length 40 is more than the model's own context of 32" in said
    assert "weigh more" not in said


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cluscomp {importlib.metadata.version('cluscomp-jax')}\n"


def test_an_empty_prompt(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "--prompt" in wrong(capsys, ["generate", str(folder / "model"), "--prompt", ""])


def test_a_model_without_a_tokenizer(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    write_hf(tmp_path / "mute", config_fields(), tensors())
    line = wrong(capsys, ["evaluate", str(tmp_path / "mute"), "--text", str(folder / "text.txt"), "--context", "8"])
    assert "tokenizer" in line


def test_a_config_that_is_no_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_fields())[:-1])
    assert "config.json" in wrong(capsys, ["evaluate", str(tmp_path), "--text", "t"])
