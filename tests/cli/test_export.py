"""`export` and `import` on the command line: what they print, what they leave, what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_models import make_params, save
from safetensors.numpy import load_file, save_file

from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.cli import main
from cluscomp_jax.cli.arguments import CompareArguments, CompressArguments
from cluscomp_jax.cli.command_line import command_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli_export")
    save(folder / "small", make_params())
    assert main(["export", str(folder / "small"), "--format", "aqlm", "--out", str(folder / "aqlm")]) == 0
    return folder


def succeed(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    fields: dict[str, Any] = json.loads(out.splitlines()[-1])
    return fields


def refuse(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_export_tells_what_it_wrote(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    argv = ["export", str(folder / "small"), "--format", "dense", "--out", str(out), "--shard-gb", "1.5"]
    fields = succeed(capsys, argv)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert fields["files"] == len(files)
    assert fields["bytes"] == sum(path.stat().st_size for path in files)
    assert fields["peak_rss_bytes"] > 0
    assert (
        f"cluscomp export {folder / 'small'} --format dense --out {out} --shard-gb 1.5"
        in (out / "README.md").read_text()
    )
    argv = ["--text", str(write_tokens(tmp_path)), "--context", "16"]
    found = succeed(capsys, ["evaluate", str(out), *argv])["perplexity"]
    assert found == succeed(capsys, ["evaluate", str(folder / "small"), *argv])["perplexity"]


def write_tokens(folder: Path) -> Path:
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 34, 64).astype(np.int32))
    return folder / "tokens.npy"


def test_an_aqlm_folder_is_a_model_like_any_other(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    argv = ["--text", str(write_tokens(tmp_path)), "--context", "16"]
    found = succeed(capsys, ["evaluate", str(folder / "aqlm"), *argv])["perplexity"]
    assert found == succeed(capsys, ["evaluate", str(folder / "small"), *argv])["perplexity"]
    assert "already compressed" in refuse(capsys, ["compress", str(folder / "aqlm"), "--out", str(tmp_path / "o")])


def test_an_import_is_the_checkpoint_that_was_exported(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    fields = succeed(capsys, ["import", str(folder / "aqlm"), "--out", str(tmp_path / "back")])
    assert fields["matrices"] == 14
    back = open_checkpoint(tmp_path / "back", verify=True)
    assert back.fingerprint() == open_checkpoint(folder / "small").fingerprint()
    assert back.manifest.provenance["command"] == f"cluscomp import {folder / 'aqlm'} --out {tmp_path / 'back'}"


def rescaled(folder: Path, out: Path, change: Any) -> Path:
    """A copy of the AQLM folder whose scales are changed."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for name, array in tensors.items():
                if name.endswith(".scales"):
                    tensors[name] = change(array)
            save_file(tensors, out / file.name)
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def test_one_scale_of_all_rows_goes_into_the_codebook(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    model = rescaled(folder / "aqlm", tmp_path / "m", lambda scales: scales * np.float16(0.5))
    assert succeed(capsys, ["import", str(model), "--out", str(tmp_path / "back")])["matrices"] == 14
    kernel = open_checkpoint(tmp_path / "back").load_block(1)["mlp"]["up_proj"]["kernel"]
    original = open_checkpoint(folder / "small").load_block(1)["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel.codebook, original.codebook * np.float16(0.5))
    np.testing.assert_array_equal(kernel.index, original.index)


def test_a_scale_that_codes_do_not_bear_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    model = rescaled(folder / "aqlm", tmp_path / "m", lambda scales: scales * 0 + np.float16(6.5e4))
    large = load_file(model / "model.safetensors")
    large |= {name: array * np.float16(20) for name, array in large.items() if name.endswith(".codebooks")}
    save_file(large, model / "model.safetensors")
    assert "beyond the range of float16" in refuse(capsys, ["import", str(model), "--out", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


def test_scales_of_single_rows_are_refused_or_stored_decoded(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    model = rescaled(
        folder / "aqlm", tmp_path / "m", lambda s: s * np.linspace(0.5, 2, len(s), dtype=s.dtype)[:, None, None, None]
    )
    argv = ["import", str(model), "--out", str(tmp_path / "back")]
    line = refuse(capsys, argv)
    assert "q_proj/kernel: its rows have scales from 0.5 to 2" in line
    assert "--allow-dense" in line
    assert not (tmp_path / "back").exists()
    assert succeed(capsys, [*argv, "--allow-dense"])["matrices"] == 0
    kernel = open_checkpoint(tmp_path / "back").load_block(0)["mlp"]["up_proj"]["kernel"]
    table = load_file(model / "model.safetensors")
    codes = table["model.layers.0.mlp.up_proj.codes"][..., 0].astype(int) % 512
    vectors = table["model.layers.0.mlp.up_proj.codebooks"][0, codes, :, 0] * table[
        "model.layers.0.mlp.up_proj.scales"
    ].reshape(-1, 1, 1)
    np.testing.assert_allclose(kernel.T, vectors.swapaxes(1, 2).reshape(kernel.T.shape), rtol=1e-3)


def aqlm_with(folder: Path, out: Path, **changes: Any) -> Path:
    rescaled(folder / "aqlm", out, lambda scales: scales)
    fields = json.loads((out / "config.json").read_text())
    fields["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(fields))
    return out


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "two codebooks": ({"num_codebooks": 2}, "2 codebooks per matrix"),
    "groups both ways": ({"in_group_size": 4}, "groups of 4 x 4"),
    "wide codes": ({"nbits_per_codebook": 17}, "codes of 17 bits"),
    "other bits": (
        {"nbits_per_codebook": 10},
        "has shape [1, 512, 4, 1], the config makes it [1, 1024, 4, 1]",
    ),
    "no number": ({"nbits_per_codebook": "9"}, "whole numbers above 0"),
    "other method": ({"quant_method": "gptq"}, "quantised with 'gptq'"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_aqlm_folder_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = aqlm_with(folder, tmp_path / "m", **changes)
    assert message in refuse(capsys, ["import", str(model), "--out", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


def test_wrong_input_is_refused(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    out, small = str(tmp_path / "o"), str(folder / "small")
    assert "not empty" in refuse(capsys, ["export", small, "--format", "dense", "--out", str(folder)])
    assert "no such folder" in refuse(capsys, ["export", "nowhere", "--format", "dense", "--out", out])
    assert "--shard-gb nan" in refuse(capsys, ["export", small, "--format", "dense", "--out", out, "--shard-gb", "nan"])
    line = refuse(capsys, ["export", small, "--format", "orbax", "--out", out, "--code-bits", "9"])
    assert "no effect on orbax" in line
    line = refuse(capsys, ["export", small, "--format", "orbax", "--out", out, "--shard-gb", "1"])
    assert "no effect on orbax" in line
    line = refuse(capsys, ["import", small, "--out", out])
    assert "is no AQLM model" in line
    assert "already" in line
    file = folder / "aqlm" / "config.json"
    assert "is a file, not a folder" in refuse(capsys, ["export", str(file), "--format", "dense", "--out", out])
    dense = refuse(capsys, ["export", str(folder / "aqlm"), "--format", "dense", "--out", out])
    assert "give the output folder of compress" in dense
    assert not Path(out).exists()


def test_a_command_line_names_what_is_not_default() -> None:
    arguments = CompressArguments(model="a b", out="o", bits=2.5, export="aqlm", no_tuning=True, json=True)
    assert command_line(arguments) == "cluscomp compress 'a b' --out o --bits 2.5 --for aqlm --no-tuning"
    assert command_line(CompareArguments(models=("a", "b"), out="o")) == "cluscomp compare a b --out o"
