"""Exports read back by the libraries they are for, next to a lookup in NumPy; and what a format must refuse."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from export_models import Run, coded, decoded, make_params, save
from io_models import config_fields
from safetensors import safe_open

from cluscomp_jax.checkpoint.reader import CheckpointSource, open_checkpoint, save_checkpoint
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.io.hf.aqlm_source import AqlmSource
from cluscomp_jax.models.llama import parse_config
from cluscomp_jax.models.source import load_all

COMPANIONS = {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    return save(tmp_path_factory.mktemp("export") / "small", make_params(g=5))


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    return save(tmp_path_factory.mktemp("export") / "small", make_params(g=4))


def expected(source: CheckpointSource) -> dict[str, np.ndarray]:
    params = make_params(g=source.manifest.to_dict()["matrices"]["model/layers/0/mlp/up_proj/kernel"]["group_size"])
    return {path: decoded(leaf) for path, leaf in trees.flatten(params).items()}


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def hugging_face(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    name = path.replace("/", ".")
    if name.endswith(".kernel"):
        return name.removesuffix("kernel") + "weight", array.T
    return name.replace("embed_tokens.embedding", "embed_tokens.weight"), array


def same(found: Any, want: np.ndarray) -> bool:
    return found.dtype == want.dtype and np.array_equal(np.asarray(found), want)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_dense_safetensors_hold_every_decoded_weight(
    source: CheckpointSource, tmp_path: Path, shard_bytes: int
) -> None:
    files = export_checkpoint(source, tmp_path / "out", "dense", shard_bytes=shard_bytes)
    found = read_safetensors(tmp_path / "out")
    want = dict(hugging_face(path, array) for path, array in expected(source).items())
    assert found.keys() == want.keys()
    assert all(same(found[name], want[name]) for name in want)
    shards = {file.name for file in files if file.suffix == ".safetensors"}
    assert {file.name for file in files} - shards - {"model.safetensors.index.json"} == COMPANIONS
    if shard_bytes < 10**9:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
        assert set(index["weight_map"].values()) == shards
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in want.values())


def test_a_dtype_is_that_of_all_tensors(source: CheckpointSource, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "out", "dense", dtype="float32")
    found, want = read_safetensors(tmp_path / "out"), expected(source)
    assert all(array.dtype == np.float32 for array in found.values())
    for path, array in want.items():
        name, stored = hugging_face(path, array)
        np.testing.assert_array_equal(found[name], stored.astype(np.float32))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_a_value_beyond_a_dtype_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    params = make_params()
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"] * np.float32(1e6)
    source = save(tmp_path / "small", params)
    with pytest.raises(InputError, match=r"model/norm/weight: .*e\+06 is beyond the range of float16"):
        export_checkpoint(source, tmp_path / "out", "dense", dtype="float16")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["small", "small-tokenizer"]


def test_orbax_alone_restores_decoded_parameters(source: CheckpointSource, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "out", "orbax")
    found, want = restore(tmp_path / "out/params"), expected(source)
    assert found.keys() == want.keys()
    assert all(same(found[path], want[path]) for path in want)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_orbax_alone_restores_codebooks_and_indices(tmp_path: Path, axis: str) -> None:
    params = make_params(g=5, axis=axis)
    export_checkpoint(save(tmp_path / "small", params), tmp_path / "out", "orbax-codebook")
    found = restore(tmp_path / "out/params")
    described = json.loads((tmp_path / "out/codebooks.json").read_text())
    for path, leaf in trees.flatten(params).items():
        if isinstance(leaf, CodebookArray):
            assert same(found.pop(f"{path}/codebook"), leaf.codebook)
            assert same(found.pop(f"{path}/index"), leaf.index)
            assert described.pop(path) == {"shape": list(leaf.shape), "axis": axis}
        else:
            assert same(found.pop(path), leaf)
    assert not found
    assert not described


def restore(folder: Path) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        return trees.flatten(checkpointer.restore(folder.absolute()))


def test_the_decoder_on_the_card_of_codebooks_decodes(tmp_path: Path) -> None:
    for axis in ("out", "in"):
        source = save(tmp_path / axis, make_params(g=5, axis=axis))
        export_checkpoint(source, tmp_path / f"{axis}-out", "orbax-codebook")
        code = (tmp_path / f"{axis}-out/README.md").read_text().split("```python\n")[1].split("```")[0]
        scope: dict[str, Any] = {}
        exec("import jax.numpy as jnp\n" + code[code.index("def decode") :], scope)
        leaf = coded(np.random.default_rng(0), (12, 13), g=5, n=7, axis=axis)
        found = scope["decode"]({"codebook": leaf.codebook, "index": leaf.index}, leaf.shape, axis)
        np.testing.assert_array_equal(np.asarray(found), decoded(leaf))


@pytest.mark.parametrize(("g", "n", "axis", "bits"), [(4, 300, "out", 9), (8, 65, "in", 7), (2, 256, "in", 9)])
def test_aqlm_tensors_stand_for_the_same_weights(tmp_path: Path, g: int, n: int, axis: Any, bits: int) -> None:
    params = make_params(g=g, n=n, axis=axis)
    export_checkpoint(save(tmp_path / "small", params), tmp_path / "out", "aqlm")
    found = read_safetensors(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "aqlm",
        "nbits_per_codebook": bits,
        "num_codebooks": 1,
        "in_group_size": 1 if axis == "out" else g,
        "out_group_size": g if axis == "out" else 1,
        "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight"],
    }
    for path, leaf in trees.flatten(params).items():
        name, weight = hugging_face(path, decoded(leaf))
        if isinstance(leaf, CodebookArray):
            parts = [found.pop(name.replace("weight", part)) for part in ("codes", "codebooks", "scales")]
            assert same(aqlm_weight(*parts, bits), weight)
            assert parts[0].dtype == (np.int8 if bits <= 8 else np.int16)
        else:
            assert same(found.pop(name), weight)
    assert not found


def aqlm_weight(codes: np.ndarray, codebooks: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """AQLM's definition, one group at a time."""
    _, rows, out_group, in_group = codebooks.shape
    assert rows == 2**bits
    weight = np.empty((codes.shape[0] * out_group, codes.shape[1] * in_group), codebooks.dtype)
    for o, i in np.ndindex(*codes.shape[:2]):
        vector = codebooks[0, int(codes[o, i, 0]) % rows] * scales[o, 0, 0, 0]
        weight[o * out_group : (o + 1) * out_group, i * in_group : (i + 1) * in_group] = vector
    return weight


def test_a_dense_kernel_among_compressed_ones_is_named_in_the_config(tmp_path: Path) -> None:
    params = make_params()
    outer = decoded(params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"])
    params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"] = outer
    export_checkpoint(save(tmp_path / "small", params), tmp_path / "out", "aqlm")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    module = "model.layers.1.mlp.up_proj"
    assert config["linear_weights_not_to_quantize"][2:] == [module, f"{module}.weight"]
    assert same(read_safetensors(tmp_path / "out")[f"{module}.weight"], outer.T)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_an_aqlm_export_read_back_is_the_same_checkpoint(tmp_path: Path, axis: Any, tied: bool) -> None:
    params = make_params(axis=axis, tied=tied)
    export_checkpoint(save(tmp_path / "small", params, tie_word_embeddings=tied), tmp_path / "out", "aqlm")
    back = AqlmSource(tmp_path / "out")
    found, want = trees.flatten(load_all(back, back.model)), trees.flatten(params)
    assert found.keys() == want.keys()
    for path, leaf in want.items():
        assert same(decoded(found[path]), decoded(leaf))
        if isinstance(leaf, CodebookArray):
            assert same(found[path].index, leaf.index)
            assert same(found[path].codebook, leaf.codebook)


def other_g(params: Any) -> None:
    kernel = coded(np.random.default_rng(0), (64, 96), g=2, n=300)
    params["model"]["layers"]["1"]["mlp"]["gate_proj"]["kernel"] = kernel


def whole(params: Any) -> None:
    for i in "01":
        for part in ("self_attn", "mlp"):
            for module in params["model"]["layers"][i][part].values():
                module["kernel"] = decoded(module["kernel"])


def coded_head(params: Any) -> None:
    params["lm_head"]["kernel"] = coded(np.random.default_rng(0), (64, 40), g=4, n=300)


REFUSED: dict[str, tuple[dict[str, Any], Any, dict[str, Any], str]] = {
    "padding": (
        {"g": 5},
        None,
        {},
        r"model/layers/0/\S+_proj/kernel: g=5 does not divide the \d+ weights along 'out'.*1, 2, 4, 8, 16, 32",
    ),
    "padding along in": ({"g": 5, "axis": "in"}, None, {}, r"g=5 does not divide the \d+ weights along 'in'"),
    "two cuts": ({}, other_g, {}, r"gate_proj/kernel has g=2 along 'out'.*has g=4 along 'out'.*--for aqlm"),
    "nothing compressed": ({}, whole, {}, "needs compressed matrices"),
    "a compressed head": ({}, coded_head, {}, "lm_head/kernel is compressed"),
    "too few bits": ({}, None, {"code_bits": 8}, "the matrices need 9"),
    "too many bits": ({}, None, {"code_bits": 17}, "at most 16"),
    "the bits that aqlm gets wrong": ({"n": 200}, None, {"code_bits": 8}, "8 give wrong sums"),
    "a dtype": ({}, None, {"dtype": "float32"}, "no effect on aqlm"),
}


@pytest.mark.parametrize(("options", "change", "asked", "message"), REFUSED.values(), ids=REFUSED)
def test_what_aqlm_cannot_hold_is_refused(
    tmp_path: Path, options: dict[str, Any], change: Any, asked: dict[str, Any], message: str
) -> None:
    params = make_params(**options)
    if change is not None:
        change(params)
    source = save(tmp_path / "small", params)
    with pytest.raises(InputError, match=message):
        export_checkpoint(source, tmp_path / "out", "aqlm", **asked)
    assert not (tmp_path / "out").exists()


def test_codes_can_be_made_wide_enough_for_the_fast_kernels(divisible: CheckpointSource, tmp_path: Path) -> None:
    export_checkpoint(divisible, tmp_path / "out", "aqlm", code_bits=16)
    found = read_safetensors(tmp_path / "out")
    assert found["model.layers.0.mlp.up_proj.codebooks"].shape == (1, 65536, 4, 1)
    back = AqlmSource(tmp_path / "out").load_block(0)["mlp"]["up_proj"]["kernel"]
    assert back.codebook.shape == (300, 4)


def test_the_card_says_what_was_measured_and_how_it_was_made(divisible: CheckpointSource, tmp_path: Path) -> None:
    export_checkpoint(divisible, tmp_path / "out", "aqlm", command="cluscomp export small --format aqlm")
    card = (tmp_path / "out/README.md").read_text()
    totals = divisible.manifest.to_dict()["totals"]
    for text in (
        "base_model: owner/tiny",
        f"{totals['bits_per_weight']:.3f}, codebooks included",
        "text.txt, 4 x 16 tokens",
        "12.5000",
        "cluscomp compress tiny --out tiny-small",
        "cluscomp export small --format aqlm",
        '"seed": 3',
        "jax 1.2.3",
    ):
        assert text in card


def test_a_folder_that_holds_anything_is_left_alone(divisible: CheckpointSource, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export_checkpoint(divisible, tmp_path, "dense")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("form", ["dense", "orbax"])
def test_of_a_tokenizers_folder_only_its_files_are_taken(tmp_path: Path, form: Any) -> None:
    def tokenizer(folder: Path) -> None:
        for name in ("tokenizer.json", "config.json", "model.safetensors", "README.md"):
            (folder / name).write_text("not ours")

    params, run = make_params(), Run(parse_config(config_fields()))
    save_checkpoint(tmp_path / "c", params, run, tokenizer=tokenizer)
    export_checkpoint(open_checkpoint(tmp_path / "c"), tmp_path / "e", form)
    held = {path.name for path in (tmp_path / "e").rglob("*") if path.is_file() and path.read_bytes() == b"not ours"}
    assert held == {"tokenizer.json"}


def test_what_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    params = make_params()
    params["model"]["norm"]["weight"] = np.full_like(params["model"]["norm"]["weight"], np.nan)
    with pytest.raises(InputError, match="model/norm/weight: holds NaN or Inf"):
        export_checkpoint(save(tmp_path / "c", params), tmp_path / "e", "dense")
    assert not (tmp_path / "e").exists()


def test_a_damaged_checkpoint_leaves_no_export(tmp_path: Path) -> None:
    source = save(tmp_path / "small", make_params())
    file = next(tmp_path.glob("small/blocks/00001/self_attn.o_proj.kernel.index/0"))
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    for form in ("dense", "aqlm", "orbax", "orbax-codebook"):
        with pytest.raises(InputError, match="damaged"):
            export_checkpoint(open_checkpoint(tmp_path / "small"), tmp_path / "out", form)  # type: ignore[arg-type]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["small", "small-tokenizer"]
    assert math.isclose(source.manifest.contents.totals["matrices"], 14)
