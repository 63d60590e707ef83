"""`compress --begin-windows`: what samples and windows begin with, what is recorded, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_models import write_model, write_text

from cluscomp_jax.checkpoint.reader import describe
from cluscomp_jax.cli import main
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig, load_config
from cluscomp_jax.models.calibration import digest_of

BEGIN = 1
CODES = ["--no-tuning", "--g", "4", "--num-codes", "4"]


@pytest.fixture(name="model", scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config names a begin token and whose tokenizer has none, next to arrays of its tokens."""
    folder = tmp_path_factory.mktemp("begin")
    for name, count in (("train", 200), ("test", 45)):
        np.save(folder / f"{name}.npy", np.random.default_rng(count).integers(2, 30, count))
    write_text(folder / "text.txt", 200)
    return write_model(folder / "model", bos_token_id=BEGIN)


def argv(model: Path, out: Path, *more: str) -> list[str]:
    samples = ["--calibration", str(model.parent / "train.npy"), "--samples", "3", "--length", "8"]
    return ["compress", str(model), "--out", str(out), *CODES, *samples, *more]


def test_every_sample_and_every_window_begins_with_the_token(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    test = str(model.parent / "test.npy")
    measure = ["--evaluate", test, "--context", "8"]
    assert main([*argv(model, tmp_path / "out", *measure, "--begin-windows"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "3 x 8 tokens, every sample begun by the begin token" in err
    assert "every window begins with the model's begin token" in out
    said = json.loads(out.splitlines()[-1])
    assert said["begin_windows"] is True
    made = describe(tmp_path / "out")
    assert made["run_config"]["calibration"]["begin_windows"] is True
    train = np.load(model.parent / "train.npy")
    starts = np.random.default_rng(42).integers(0, 192, size=3, endpoint=True)
    expected = np.stack([np.concatenate([[BEGIN], train[start + 1 : start + 8]]) for start in starts])
    assert made["provenance"]["calibration"]["sha256"] == digest_of(expected.astype(np.int32))
    assert main(["evaluate", str(model), "--text", test, "--context", "8", "--begin-windows", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["perplexity"]["original"]["perplexity"] == pytest.approx(alone["perplexity"])
    assert alone["windows"] == 6


def test_a_folder_of_the_other_setting_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    assert main(argv(model, tmp_path / "out")) == 0
    assert "begin_windows" not in describe(tmp_path / "out")["run_config"]["calibration"]
    capsys.readouterr()
    assert main(argv(model, tmp_path / "out", "--begin-windows")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "calibration.begin_windows is None there, True here" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--begin-windows"], "--begin-windows has no effect without a text"),
        (["--begin-windows", "--calibration", "{}/text.txt", "--length", "8"], "names no token that begins a text"),
        (["--begin-windows", "--calibration", "{}/inputs.npz"], "--begin-windows has no effect without a text"),
    ],
)
def test_what_cannot_begin_is_refused(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    options = [part.format(model.parent) for part in more]
    assert main(["compress", str(model), "--out", str(tmp_path / "out"), *CODES, *options]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_config_file_says_it_too(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[calibration]\nbegin_windows = true\n")
    config = load_config(tmp_path / "run.toml")
    assert config == CompressConfig(calibration=CalibrationConfig(begin_windows=True))
    assert "begin_windows" not in CompressConfig().to_dict()["calibration"]
