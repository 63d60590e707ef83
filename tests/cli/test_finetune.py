"""`cluscomp finetune` on a tiny model: through the command line, killed outright, and given wrong input."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_files import scalars
from finetune_runs import finetune_argv, write_inputs

from cluscomp_jax import finetuning
from cluscomp_jax.checkpoint.reader import load_checkpoint, open_checkpoint
from cluscomp_jax.cli import main
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.reporting.html.records import read_records
from cluscomp_jax.text.token_rows import ShuffledBatches, TokenRows
from cluscomp_jax.training import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("finetune"))


def argv(folder: Path, out: Path, *more: str, steps: int = 6) -> list[str]:
    return finetune_argv(folder, out, *more, steps=steps)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The folder of an uninterrupted run."""
    assert main(argv(folder, folder / "whole")) == 0
    return folder / "whole"


def test_the_result_is_a_checkpoint_whose_codebooks_have_moved(folder: Path, whole: Path) -> None:
    before, after = (trees.flatten(load_checkpoint(path).params) for path in (folder / "small", whole))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if isinstance(leaf, CodebookArray):
            np.testing.assert_array_equal(after[path].index, leaf.index)
            assert after[path].codebook.dtype == leaf.codebook.dtype == np.float16
            assert not np.array_equal(after[path].codebook, leaf.codebook)
        elif path != "model/norm/weight":
            np.testing.assert_array_equal(after[path], leaf)
    assert not (whole / "work").exists()
    assert open_checkpoint(whole, verify=True).tokenizer_path is not None


def test_a_token_cache_changes_nothing_of_the_result(folder: Path, whole: Path) -> None:
    cache, wanted = folder / "cache", trees.flatten(load_checkpoint(whole).params)
    stored = []
    for name in ("stored", "found"):
        assert main(argv(folder, folder / name, "--token-cache", str(cache))) == 0
        stored.append(sorted((file.name, file.stat().st_mtime_ns) for file in cache.iterdir()))
        found = trees.flatten(load_checkpoint(folder / name).params)
        for path, leaf in wanted.items():
            if isinstance(leaf, CodebookArray):
                np.testing.assert_array_equal(found[path].codebook, leaf.codebook)
    assert stored[0] == stored[1]
    assert len(stored[0]) == 2


def test_a_run_that_goes_on_has_all_its_scalars_or_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for name, options in (("scalars", ["--tensorboard"]), ("none", [])):
        out = folder / name
        with monkeypatch.context() as patch:
            patch.setattr(run, "train_step", lambda *a, **k: stop())
            assert main(argv(folder, out, "--tensorboard")) != 0
        assert scalars(out / "tensorboard").keys() == {
            (f"evaluation/{key}", 0) for key in ("nll", "perplexity", "tokens")
        }
        assert main(argv(folder, out, *options)) == 0
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        if options:
            found = scalars(out / "tensorboard")
            losses = {("step/loss", record["step"]): record["loss"] for record in records if record["event"] == "step"}
            assert losses == {key: pytest.approx(value[0]) for key, value in found.items() if key[0] == "step/loss"}
        else:
            assert not (out / "tensorboard").exists()
        assert open_checkpoint(out, verify=True).tokenizer_path is not None


def test_losses_are_recorded_and_the_last_evaluation_is_that_of_the_checkpoint(
    capsys: pytest.CaptureFixture[str], folder: Path, whole: Path
) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    evaluations = [record for record in records if record["event"] == "evaluation"]
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert [record["step"] for record in evaluations] == [0, 4, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    text = str(folder / "held_out.txt")
    assert main(["evaluate", str(whole), "--text", text, "--context", "16", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluations[-1]["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-5)


def test_inspect_shows_where_the_result_comes_from(capsys: pytest.CaptureFixture[str], whole: Path) -> None:
    assert main(["inspect", str(whole), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fields["run_config"]["finetune"]["training"]["steps"] == 6
    assert fields["run_config"]["finetune"]["data"]["length"] == 16
    assert fields["provenance"]["model"]["name"] == "small"
    assert fields["provenance"]["training"]["shape"] == [45, 16]
    assert fields["provenance"]["command"].startswith("cluscomp finetune ")
    assert fields["metrics"]["finetune"]["steps"] == 6


def test_the_stages_before_it_can_be_noted_beside_it(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for model in (out, folder / "model", folder / "small"):
        argv = ["evaluate", str(model), "--text", str(folder / "held_out.txt"), "--context", "16"]
        assert main([*argv, "--record", str(out)]) == 0
    records = read_records(out)
    assert (list(records.perplexity), records.stage) == (["original", "clustered", "finetuned"], "finetuned")
    assert records.unmeasured == []


def start(folder: Path, out: Path, steps: int) -> "subprocess.Popen[str]":
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "cluscomp_jax", *argv(folder, out, steps=steps)]
    return subprocess.Popen(
        command, env={**os.environ, **cache}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> None:
    """Waits for a run that must succeed."""
    _, err = process.communicate()
    assert process.returncode == 0, err


def untimed(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in r.items() if key not in ("time", "seconds")} for r in records]


def test_a_stopped_run_given_again_ends_in_the_bits_of_one_that_was_not(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(ShuffledBatches):
        def batch(self, step: int) -> TokenRows:
            if step == 5:
                raise KeyboardInterrupt
            return super().batch(step)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "ShuffledBatches", Stopped)
        assert main(argv(folder, tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main(argv(folder, tmp_path / "out")) == 0
    resumed, expected = (open_checkpoint(path, verify=True) for path in (tmp_path / "out", whole))
    assert resumed.fingerprint() == expected.fingerprint()
    assert resumed.manifest.metrics["finetune"]["first_step"] == 4
    assert untimed(tmp_path / "out" / "metrics.jsonl") == untimed(whole / "metrics.jsonl")


@pytest.mark.slow
def test_a_killed_run_given_again_ends_in_the_bits_of_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    steps = 40
    with start(folder, tmp_path / "out", steps) as victim:
        while not list(tmp_path.glob("out/work/run/states/[0-9]*[0-9]")):
            assert victim.poll() is None, victim.communicate()
            time.sleep(0.01)
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    for out in ("out", "again"):
        assert main(argv(folder, tmp_path / out, steps=steps)) == 0
    resumed, again = (open_checkpoint(tmp_path / out, verify=True) for out in ("out", "again"))
    assert resumed.fingerprint() == again.fingerprint()
    assert untimed(tmp_path / "out" / "metrics.jsonl") == untimed(tmp_path / "again" / "metrics.jsonl")
    summaries = [source.manifest.metrics["finetune"] for source in (resumed, again)]
    assert summaries[0]["first_step"] > 0 == summaries[1]["first_step"]
    assert summaries[0]["losses"] == summaries[1]["losses"]


@pytest.mark.slow
def test_a_run_killed_at_any_of_ten_moments_ends_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    steps = 60
    finish(start(folder, tmp_path / "warm", steps))  # fills the cache of compiled programs
    began = time.monotonic()
    finish(start(folder, tmp_path / "whole", steps))
    seconds, expected = time.monotonic() - began, open_checkpoint(tmp_path / "whole").fingerprint()
    killed = 0
    for i, moment in enumerate(np.random.default_rng(0).uniform(0, seconds, 10)):
        out = tmp_path / f"out-{i}"
        with start(folder, out, steps) as victim:
            with contextlib.suppress(subprocess.TimeoutExpired):
                victim.wait(moment)
            victim.kill()
            killed += victim.wait() == -signal.SIGKILL
        if not (out / "manifest.json").exists():
            finish(start(folder, out, steps))
        elif (out / "work").exists():  # killed between the manifest and the removal of work/
            assert start(folder, out, steps).wait() == 2
        assert open_checkpoint(out, verify=True).fingerprint() == expected
        assert untimed(out / "metrics.jsonl") == untimed(tmp_path / "whole" / "metrics.jsonl")
        assert not (out / "work").exists()
    assert killed >= 8  # the others had ended first


def test_a_teacher_is_named_in_the_result_and_the_best_state_can_be_kept(folder: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", str(folder / "model"), "--result", "best", "--learning-rate", "0.3"]
    assert main(argv(folder, tmp_path / "o", *teacher)) == 0
    found = open_checkpoint(tmp_path / "o", verify=True)
    training = found.manifest.run_config["finetune"]["training"]
    assert training["distillation"] == {"weight": 1.0, "temperature": 1.0}
    assert found.manifest.provenance["teacher"]["name"] == "model"
    summary = found.manifest.metrics["finetune"]
    best = min(summary["evaluations"], key=lambda measured: measured["nll"])
    assert summary["result_step"] == best["step"]


def test_the_same_command_again_says_that_it_is_finished(
    capsys: pytest.CaptureFixture[str], folder: Path, whole: Path
) -> None:
    assert main(argv(folder, whole)) == 2
    assert "already finished" in capsys.readouterr().err


@pytest.mark.nans
def test_a_run_that_diverges_does_not_say_that_repeating_helps(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    assert main(argv(folder, tmp_path / "o", "--learning-rate", "1e30")) == 1
    err = capsys.readouterr().err
    assert "step 2: the loss is nan" in err
    assert "resume" not in err.splitlines()[-1]


def broken_lines(folder: Path) -> list[str]:
    (folder / "broken.jsonl").write_text('{"text": "abc"}\n{"text": }\n')
    return ["--data", str(folder / "broken.jsonl")]


def conversations(folder: Path) -> list[str]:
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    return ["--data", str(folder / "chat.jsonl")]


def foreign_tokens(folder: Path) -> list[str]:
    np.save(folder / "tokens.npy", np.full(64, 40))
    return ["--data", str(folder / "tokens.npy")]


def unknown_key(folder: Path) -> list[str]:
    (folder / "bad.toml").write_text("[training]\nepochs = 3\n")
    return ["--config", str(folder / "bad.toml")]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (broken_lines, "broken.jsonl line 2: is not JSON"),
        (conversations, "the model's tokenizer has no chat template"),
        (foreign_tokens, "token id 40, the vocabulary has 40"),
        (unknown_key, "key 'training.epochs' is not known"),
        (lambda folder: ["--data", str(folder / "none.txt")], "is neither a file nor"),
        (lambda folder: ["--length", "129"], "rows (--length) of 129 tokens exceed the model's context of 128"),
        (lambda folder: ["--steps", "0"], "steps is 0"),
        (lambda folder: ["--trainable", "lm_heads"], "trainable 'lm_heads' matches no array"),
        (lambda folder: ["--teacher", str(folder / "nowhere")], "is neither a folder"),
        (lambda folder: ["--mesh", "data=2"], "mesh data=2,fsdp=1,tensor=1 takes 2 devices, there are 1"),
        (lambda folder: ["--mesh", "fsdp=3"], "batch_size is 2, mesh data=1,fsdp=3,tensor=1 spreads its rows over 3"),
        (lambda folder: ["--mesh", "model=2"], "key 'model' is not known; known here: data, fsdp, tensor"),
        (lambda folder: ["--mesh", "data=2,data=1"], "'data=1' must be AXIS=SIZE, every axis once"),
        (lambda folder: ["--mesh", "data=0"], "mesh.data is 0; it must be 1 or more"),
        (lambda folder: ["--process-id", "1"], "--process-id 1 has no effect without --coordinator"),
        (lambda folder: ["--coordinator", "a:1"], "--coordinator a:1 needs --num-processes and --process-id"),
        (lambda folder: ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "--process-id is 2"),
        (lambda folder: ["--coordinator", "a", "--num-processes", "2", "--process-id", "1"], "must be HOST:PORT"),
        (lambda folder: ["--out", str(folder / "small")], "is the model that is to be finetuned"),
        (lambda folder: ["--responses-only"], "is running text, which has no responses"),
    ],
)
def test_wrong_input_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, change: Any, text: str
) -> None:
    assert main(argv(folder, tmp_path / "o", *change(folder))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cluscomp: error: ")]
    assert len(lines) == 1
    assert text in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_an_option_without_effect_is_refused(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    command = ["finetune", str(folder / "small"), "--data", str(folder / "text.txt"), "--out", str(tmp_path / "o")]
    assert main([*command, "--evaluate-every", "3"]) == 2
    assert "--evaluate-every 3 has no effect without --evaluation" in capsys.readouterr().err
    assert main([*command, "--result", "best"]) == 2
    assert "result is 'best', which needs --evaluation FILE" in capsys.readouterr().err
