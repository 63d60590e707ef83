"""compress, evaluate, generate and inspect on a tiny model, through the command line and in one process."""

import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import write_model, write_text

from cluscomp_jax import CompressionRule, cluster_tree, compression_run, save
from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.manifest import FORMAT_VERSION
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.checkpoint.writer import CheckpointWriter
from cluscomp_jax.cli import main
from cluscomp_jax.models.prefetch import PREFETCH, WRITE_BACK

OPTIONS = ["--samples", "4", "--length", "16", "--epochs", "1", "--g", "4", "--num-codes", "8", "--seed", "3"]


def succeed(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    """The JSON line of a command that must succeed."""
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    fields: dict[str, Any] = json.loads(out.splitlines()[-1])
    return fields


def fail(capsys: pytest.CaptureFixture[str], argv: list[str], code: int) -> str:
    assert main(argv) == code
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end_to_end")
    write_model(folder / "model")
    write_text(folder / "calibration.txt", 400)
    write_text(folder / "test.txt", 200, seed=1)
    return folder


def compress_argv(folder: Path, out: Path) -> list[str]:
    return [
        "compress",
        str(folder / "model"),
        "--calibration",
        str(folder / "calibration.txt"),
        "--out",
        str(out),
        *OPTIONS,
    ]


@pytest.fixture(scope="module")
def compressed(folder: Path) -> Path:
    """The checkpoint of an uninterrupted run."""
    assert (
        main([*compress_argv(folder, folder / "out"), "--evaluate", str(folder / "test.txt"), "--context", "16"]) == 0
    )
    return folder / "out"


def evaluate_argv(folder: Path, model: Path) -> list[str]:
    return ["evaluate", str(model), "--text", str(folder / "test.txt"), "--context", "16"]


def test_what_was_measured_before_saving_is_measured_after_loading(
    capsys: pytest.CaptureFixture[str], folder: Path, compressed: Path
) -> None:
    recorded = json.loads((compressed / "manifest.json").read_text())["metrics"]["perplexity"]
    for name, model in (("original", folder / "model"), ("compressed", compressed)):
        fields = succeed(capsys, evaluate_argv(folder, model))
        assert fields["perplexity"] == recorded[name]["perplexity"]
        assert (fields["tokens"], fields["windows"], fields["context"]) == (12 * 15, 12, 16)
        assert math.isclose(math.exp(fields["nll"]), fields["perplexity"])
        assert fields["seconds"] > 0


def test_tokens_scores_the_front_of_the_text(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    fields = succeed(capsys, [*evaluate_argv(folder, folder / "model"), "--tokens", "40", "--batch-size", "2"])
    assert (fields["windows"], fields["tokens"]) == (2, 30)


def test_inspect_shows_every_matrix_with_its_error_and_the_settings(
    capsys: pytest.CaptureFixture[str], compressed: Path
) -> None:
    assert main(["inspect", str(compressed), "--verify", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    fields = json.loads(last)
    assert len(fields["metrics"]["matrices"]) == len(fields["matrices"]) == 14
    assert fields["run_config"]["cluster"]["rules"][0]["num_codes"] == 8
    assert fields["run_config"]["tuning"]["epochs"] == 1
    assert fields["provenance"]["calibration"]["shape"] == [4, 16]
    assert fields["provenance"]["model"]["name"] == "model"
    table = "\n".join(text)
    for matrix in fields["metrics"]["matrices"]:
        assert matrix["path"] in table
        assert f"{matrix['relative_error']:.5f}" in table
    events = [json.loads(line)["event"] for line in (compressed / "metrics.jsonl").read_text().splitlines()]
    assert events == ["block", "block"]


def test_generate_continues_the_prompt(capsys: pytest.CaptureFixture[str], compressed: Path) -> None:
    argv = ["generate", str(compressed), "--prompt", "abc", "--max-new-tokens", "5"]
    fields = succeed(capsys, argv)
    assert fields["prompt_tokens"] == 3
    assert 1 <= fields["new_tokens"] <= 5
    assert succeed(capsys, [*argv, "--decode_weights", "call"])["completion"] == fields["completion"]
    drawn = [succeed(capsys, [*argv, "--temperature", "9", "--top-k", "30", "--seed", seed]) for seed in "778"]
    assert drawn[0]["completion"] == drawn[1]["completion"] != drawn[2]["completion"]


def test_without_calibration_it_clusters_and_says_so(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    assert main(["compress", str(folder / "model"), "--out", str(tmp_path / "o"), "--bits", "0.9", "--json"]) == 0
    out, err = capsys.readouterr()
    fields = json.loads(out.splitlines()[-1])
    assert "clustering only (ClusComp-)" in err
    assert 0.8 < fields["bits_per_weight"] <= 0.9
    assert fields["perplexity"] == {}
    assert {"cluster", "store"} <= fields["stages"].keys()
    assert fields["diverged_blocks"] == []
    assert fields["peak_rss_bytes"] >= max(stage["peak_rss_bytes"] for stage in fields["stages"].values())
    assert all({"seconds", "peak_rss_bytes"} == stage.keys() for stage in fields["stages"].values())
    assert fields["bytes"] > 0


def test_the_stages_add_up_to_the_run(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    argv = ["compress", str(folder / "model"), "--out", str(tmp_path / "o"), "--g", "4", "--num-codes", "8"]
    assert main([*argv, "--evaluate", str(folder / "test.txt"), "--context", "16", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    fields = json.loads(last)
    names = [line.split("  ")[0] for line in text[2 : text.index("")]]
    assert names[:3] == ["prepare", "check weights", "evaluate original"]
    assert names[-3:] == ["evaluate compressed", "finish", "whole run"]
    assert set(names[:-1]) == fields["stages"].keys()
    total = sum(stage["seconds"] for name, stage in fields["stages"].items() if name not in (PREFETCH, WRITE_BACK))
    between = fields["seconds"] - total
    assert 0 <= between < max(0.2 * fields["seconds"], 0.5)  # all of a run may take less than half a second


def test_a_block_that_diverged_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    whole, blocks = compression_run.tune_block, iter(range(2))

    def diverging(*arguments: Any, **options: Any) -> Any:
        block, tuned = whole(*arguments, **options)
        return block, dataclasses.replace(tuned, diverged=next(blocks) == 1)

    monkeypatch.setattr(compression_run, "tune_block", diverging)
    assert main([*compress_argv(folder, tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    line = "block 1: loss or gradient was not finite at epoch 1; the last good codebooks are kept"
    assert err.splitlines().count(line) == 1
    assert json.loads(out.splitlines()[-1])["diverged_blocks"] == [1]
    assert "tuning stopped early where loss or gradient was not finite: block 1" in out.splitlines()


def test_an_interrupted_run_resumes_to_the_same_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, compressed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = CheckpointWriter.store_block

    def interrupted(writer: CheckpointWriter, i: int, tree: Any) -> None:
        if i == 1:
            raise KeyboardInterrupt
        whole(writer, i, tree)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "store_block", interrupted)
        assert "give the same command again to resume" in fail(capsys, compress_argv(folder, out), 1)
    assert "unfinished" in fail(capsys, evaluate_argv(folder, out), 2)
    streams = [*(out / "work").rglob("*.bin")]
    assert streams
    for path in streams:  # as a disk leaves a file that it had no time to write
        os.truncate(path, path.stat().st_size // 2)
    other = [*compress_argv(folder, out)[:-1], "4"]
    assert "seed is 3 there, 4 here" in fail(capsys, other, 2)
    assert main(compress_argv(folder, out)) == 0
    assert "resuming after 1 of 2 finished blocks" in capsys.readouterr().err
    assert open_checkpoint(out).fingerprint() == open_checkpoint(compressed).fingerprint()
    assert "already finished" in fail(capsys, compress_argv(folder, out), 2)


def test_a_full_disk_leaves_nothing_that_loads_and_can_be_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = ["compress", str(folder / "model"), "--out", str(out), "--g", "4", "--num-codes", "8"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(orbax_items, "write_item", full)
        line = fail(capsys, argv, 1)
    assert "disk is full" in line
    assert "same command" in line
    assert fail(capsys, evaluate_argv(folder, out), 2)
    assert main(argv) == 0


def test_a_disk_without_room_for_the_activations_ends_the_run_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def full(descriptor: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        line = fail(capsys, compress_argv(folder, out), 1)
    assert "No space left" in line
    assert "give the same command again to resume" in line
    assert not (out / "blocks").exists() or not any((out / "blocks").iterdir())
    assert main(compress_argv(folder, out)) == 0


def test_a_damaged_byte_is_found(
    capsys: pytest.CaptureFixture[str], folder: Path, compressed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compressed, copy)
    file = max((copy / "blocks").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert file.name in fail(capsys, evaluate_argv(folder, copy), 2)
    assert file.name in fail(capsys, ["inspect", str(copy), "--verify"], 2)


def test_a_newer_format_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], folder: Path, compressed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compressed, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["format_version"] = FORMAT_VERSION + 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    line = fail(capsys, evaluate_argv(folder, copy), 2)
    assert f"format version {manifest['format_version']}" in line
    assert "install a newer" in line


def test_what_is_compressed_is_not_compressed_again(
    capsys: pytest.CaptureFixture[str], compressed: Path, tmp_path: Path
) -> None:
    assert "already compressed" in fail(capsys, ["compress", str(compressed), "--out", str(tmp_path / "o")], 2)
    assert not (tmp_path / "o").exists()


def test_a_model_that_has_learnt_english_continues_it(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    prompt = "The city of"
    fields = succeed(capsys, ["generate", str(tiny_model), "--prompt", prompt, "--max-new-tokens", "8"])
    assert fields["new_tokens"] == 8
    letters = sum(character.isalpha() or character.isspace() for character in fields["completion"])
    assert letters > 0.7 * len(fields["completion"]) > 0


def test_inspect_shows_the_kernels_of_a_saved_tree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 8, 12)).astype(np.float32)
    rules = [CompressionRule(pattern="mlp/up", num_codes=16, axes="l d f -> l | d | f")]
    save(tmp_path / "tree", cluster_tree({"mlp": {"up": weights}, "norm": np.ones(8, np.float32)}, rules))
    assert main(["inspect", str(tmp_path / "tree"), "--verify", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    (row,) = [line for line in text if "mlp/up" in line]
    bits = 4 * 8 * 3 + 16 * 16 * 4
    assert row.split() == ["mlp/up", "8x12", "3", "4", "16", "out", f"{bits / 96:.3f}"]
    assert json.loads(last)["totals"]["matrix_bits"] == 3 * bits
    assert "verified" in "\n".join(text)
    (tmp_path / "tree/arrays/tree.norm/0").write_bytes(bytes(32))
    fail(capsys, ["inspect", str(tmp_path / "tree"), "--verify"], 2)
