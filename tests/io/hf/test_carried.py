"""Vision-language folders: the text model is read under its plain names, and all else passes through, byte for byte."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import tensors
from io_models import config_fields, write_hf
from vlm_models import TRANSFORMERS_4, TRANSFORMERS_5, nested_fields, read_raw, write_raw, write_vlm

from cluscomp_jax import CompressConfig, CompressionRule, compress, load_checkpoint, open_model, save_checkpoint
from cluscomp_jax.checkpoint.manifest import read_manifest
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.checkpoint.writer import CheckpointWriter
from cluscomp_jax.cli import main
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.models.source import load_all

FORMS = {"transformers 4": TRANSFORMERS_4, "transformers 5": TRANSFORMERS_5}
RULE = CompressionRule(group_size=2, num_codes=16)


def config_of(model: Any) -> CompressConfig:
    return CompressConfig(model=model, cluster=ClusterConfig(rules=(RULE,)), tuning=None)


def same(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found.keys() == want.keys()
    for path, leaf in want.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("form", FORMS)
def test_the_text_model_reads_as_it_does_alone(tmp_path: Path, form: str) -> None:
    write_vlm(tmp_path / "vlm", prefixes=FORMS[form])
    alone = open_model(write_hf(tmp_path / "alone", config_fields(), tensors()))
    opened = open_model(tmp_path / "vlm")
    assert opened.config == alone.config
    same(trees.flatten(load_all(opened.source, opened.model)), trees.flatten(load_all(alone.source, alone.model)))
    assert alone.carried is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_what_is_around_the_text_model_has_identical_bytes(tmp_path: Path, form: str, shard_bytes: int | None) -> None:
    around = write_vlm(tmp_path / "vlm", prefixes=FORMS[form])
    opened = open_model(tmp_path / "vlm")
    cfg = config_of(opened.config)
    assert opened.carried is not None
    save_checkpoint(tmp_path / "small", compress(opened.source, cfg), cfg, carried=opened.carried.write)
    assert read_raw(tmp_path / "small/carried/model.safetensors") == around
    source = open_checkpoint(tmp_path / "small", verify=True)
    assert source.manifest.to_dict()["format_version"] == 4
    export_checkpoint(source, tmp_path / "out", "dense", shard_bytes=shard_bytes)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 or shard_bytes is None
    found = {name: tensor for file in files for name, tensor in read_raw(file).items()}
    original = read_raw(tmp_path / "vlm/model.safetensors")
    assert found.keys() == original.keys()
    assert {name: found[name] for name in around} == around
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "vlm" / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    # What is compressed decodes to the same numbers in the export, which opens as the original does.
    again = open_model(tmp_path / "out")
    assert again.carried is not None
    params, _ = load_checkpoint(tmp_path / "small")
    want = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items() if not path.endswith("kernel")}
    got = trees.flatten(load_all(again.source, again.model))
    same({path: got[path] for path in want}, want)


def test_a_dtype_changes_the_text_model_and_the_config_alone(tmp_path: Path) -> None:
    text = config_fields(torch_dtype="float32")
    around = write_vlm(tmp_path / "vlm", nested_fields(text=text))
    opened = open_model(tmp_path / "vlm")
    assert opened.carried is not None
    save_checkpoint(tmp_path / "same", opened.source, config_of(opened.config), carried=opened.carried.write)
    export_checkpoint(open_checkpoint(tmp_path / "same"), tmp_path / "out", "dense", dtype="bfloat16")
    found = read_raw(tmp_path / "out/model.safetensors")
    assert {name: found[name] for name in around} == around
    assert {found[name][0] for name in found.keys() - around.keys()} == {"BF16"}
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields == nested_fields(text=text | {"torch_dtype": "bfloat16"}, torch_dtype="bfloat16")


def test_the_command_line_carries_along_and_finetunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    around = write_vlm(tmp_path / "vlm")
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    command = ["compress", str(tmp_path / "vlm"), "--out", str(small), "--g", "2", "--num-codes", "16"]
    assert main(command) == 0
    assert read_raw(small / "carried/model.safetensors") == around
    assert main(["inspect", str(small), "--verify"]) == 0
    assert "around the text model, as they were" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("a few words, again and again. " * 20)
    options = ["--steps", "2", "--length", "8", "--data", str(tmp_path / "text.txt")]
    assert main(["finetune", str(small), *options, "--out", str(tuned)]) == 0
    assert main(["export", str(tuned), "--format", "dense", "--out", str(tmp_path / "out")]) == 0
    found = read_raw(tmp_path / "out/model.safetensors")
    assert {name: found[name] for name in around} == around


@pytest.mark.parametrize("stopped", ["store_carried", "finish"])
def test_an_interrupted_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    around = write_vlm(tmp_path / "vlm")
    command = ["compress", str(tmp_path / "vlm"), "--g", "2", "--num-codes", "16"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, stopped, stop)
        main([*command, "--out", str(tmp_path / "small")])
    assert not (tmp_path / "small/manifest.json").exists()
    assert (tmp_path / "small/carried").is_dir() is (stopped == "finish")
    assert main([*command, "--out", str(tmp_path / "small")]) == 0
    assert read_raw(tmp_path / "small/carried/model.safetensors") == around
    for item in ("blocks", "carried"):
        files = [file for file in sorted((tmp_path / "whole" / item).rglob("*")) if file.is_file()]
        for file in files:
            if file.name != "_CHECKPOINT_METADATA":
                again = tmp_path / "small" / file.relative_to(tmp_path / "whole")
                assert again.read_bytes() == file.read_bytes()


def test_another_config_around_the_same_weights_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_vlm(tmp_path / "vlm")
    command = ["compress", str(tmp_path / "vlm"), "--g", "2", "--num-codes", "16", "--out", str(tmp_path / "small")]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "finish", stop)
        main(command)
    (tmp_path / "vlm/preprocessor_config.json").write_text("{}")
    assert main(command) == 2
    assert "carried" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_a_text_model_keeps_its_version(tmp_path: Path) -> None:
    opened = open_model(write_hf(tmp_path / "alone", config_fields(), tensors()))
    save_checkpoint(tmp_path / "same", opened.source, config_of(opened.config))
    assert read_manifest(tmp_path / "same/manifest.json").to_dict()["format_version"] == 1
    assert open_checkpoint(tmp_path / "same").carried_path() is None


def test_orbax_holds_the_text_model_alone_and_says_so(tmp_path: Path) -> None:
    write_vlm(tmp_path / "vlm")
    opened = open_model(tmp_path / "vlm")
    assert opened.carried is not None
    save_checkpoint(tmp_path / "same", opened.source, config_of(opened.config), carried=opened.carried.write)
    export_checkpoint(open_checkpoint(tmp_path / "same"), tmp_path / "out", "orbax")
    assert "This is the text model alone" in (tmp_path / "out/README.md").read_text()


def damaged(tmp_path: Path, case: str) -> Path:
    folder = tmp_path / "vlm"
    write_vlm(folder)
    tensors = read_raw(folder / "model.safetensors")
    if case == "unknown":
        tensors["language_model.model.layers.0.mlp.extra.weight"] = ("F32", [1], b"\0\0\0\0")
    if case == "missing":
        del tensors["language_model.model.norm.weight"]
    if case == "alone":
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    if case == "plain":
        tensors = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    write_raw(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "unknown",
            r"text model \(language_model.…\): tensor model.layers.0.mlp.extra.weight \[1\] is used",
        ),
        ("missing", r"text model \(language_model.…\): tensor model.norm.weight is missing"),
        ("alone", "all tensors are the text model's"),
        ("plain", "no tensor with any of the prefixes of a text model"),
    ],
)
def test_a_folder_that_does_not_fit_its_config_is_refused(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_model(damaged(tmp_path, case))
    assert "\n" not in str(error.value)


def test_a_text_model_of_no_family_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_vlm(tmp_path / "vlm", nested_fields(text=config_fields("gpt2")))
    assert main(["compress", str(tmp_path / "vlm"), "--out", str(tmp_path / "small")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json: text_config of llava: model_type 'gpt2' is not supported; supported: " in line


def test_damage_of_what_is_carried_is_named(tmp_path: Path) -> None:
    write_vlm(tmp_path / "vlm")
    opened = open_model(tmp_path / "vlm")
    assert opened.carried is not None
    save_checkpoint(tmp_path / "same", opened.source, config_of(opened.config), carried=opened.carried.write)
    file = tmp_path / "same/carried/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"carried/model\.safetensors does not have the SHA-256"):
        export_checkpoint(open_checkpoint(tmp_path / "same"), tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_a_tower_that_changes_under_the_run_is_refused(tmp_path: Path) -> None:
    write_vlm(tmp_path / "vlm")
    opened = open_model(tmp_path / "vlm")
    assert opened.carried is not None
    os.utime(tmp_path / "vlm/model.safetensors", (1, 1))
    with pytest.raises(InputError, match="was changed since it was opened"):
        save_checkpoint(tmp_path / "s", opened.source, config_of(opened.config), carried=opened.carried.write)
