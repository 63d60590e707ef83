import json
import os
import struct

import chex
import ml_dtypes
import numpy as np
import pytest
from io_models import LAYERS, config_fields, hf_tensors, write_hf
from safetensors.numpy import save_file

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf import safetensors_file
from cluscomp_jax.io.hf.safetensors_source import SafetensorsSource, read_config
from cluscomp_jax.models.model import build_model, parse_model_config
from cluscomp_jax.models.source import ParamSource, load_all

QUERY = "model.layers.1.self_attn.q_proj.weight"


def open_source(folder):
    return SafetensorsSource(folder, build_model(read_config(folder)))


def refused(folder):
    with pytest.raises(InputError) as caught:
        open_source(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


def assert_equals_tensors(params, tensors):
    """Holds a params dict against a state dict, name by name, in words of its own."""
    flat = trees.flatten(params)
    assert len(flat) == len(tensors)
    for name, stored in tensors.items():
        module, leaf = name.rsplit(".", 1)
        path = module.replace(".", "/")
        if leaf == "bias" or "norm" in module:
            np.testing.assert_array_equal(flat[f"{path}/{leaf}"], stored)
        elif module.endswith("embed_tokens"):
            np.testing.assert_array_equal(flat[f"{path}/embedding"], stored)
        else:
            np.testing.assert_array_equal(flat[f"{path}/kernel"], stored.T)
            assert flat[f"{path}/kernel"].flags.c_contiguous


@pytest.mark.parametrize("piece", [1, 100, 2**24])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_tensor_arrives_in_its_stored_dtype(tmp_path, monkeypatch, shards, dtype, piece):
    monkeypatch.setattr(safetensors_file, "_PIECE", piece)
    tensors = hf_tensors(dtype=dtype)
    source = open_source(write_hf(tmp_path, config_fields(), tensors, shards=shards))
    assert isinstance(source, ParamSource)
    params = load_all(source, build_model(parse_model_config(config_fields())))
    assert_equals_tensors(params, tensors)
    chex.assert_tree_all_finite(params)
    assert {leaf.dtype for leaf in trees.flatten(params).values()} == {np.dtype(dtype)}


def test_float64_arrives_as_float32(tmp_path):
    fields, tensors = config_fields(tie_word_embeddings=True), hf_tensors(tied=True, dtype=np.float64)
    stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    source = open_source(write_hf(tmp_path, fields, stored))
    params = load_all(source, build_model(parse_model_config(fields)))
    assert_equals_tensors(params, {name: array.astype(np.float32) for name, array in tensors.items()})
    assert {leaf.dtype for leaf in trees.flatten(params).values()} == {np.dtype(np.float32)}


def test_a_float64_beyond_float32_is_refused_when_its_block_is_loaded(tmp_path):
    tensors = hf_tensors(dtype=np.float64)
    tensors[QUERY][3, 4] = 1e39
    source = open_source(write_hf(tmp_path, config_fields(), tensors))
    with pytest.raises(InputError, match=QUERY):
        source.load_block(1)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_eight_bit_floats_are_refused_at_construction(tmp_path, dtype, name):
    tensors = hf_tensors(tied=True)
    tensors[name] = tensors["model.embed_tokens.weight"].astype(dtype)
    line = refused(write_hf(tmp_path, config_fields(tie_word_embeddings=True), tensors))
    assert f"tensor {name} is {np.dtype(dtype)}; served are bfloat16, float16, float32, float64" in line


@pytest.mark.parametrize(
    ("model_type", "changes"), [("qwen2", {}), ("qwen3", {}), ("llama", {"attention_bias": True, "mlp_bias": True})]
)
def test_biases_and_norms_of_the_families_arrive(tmp_path, model_type, changes):
    tensors = hf_tensors(model_type, **changes)
    source = open_source(write_hf(tmp_path, config_fields(model_type, **changes), tensors))
    assert_equals_tensors(load_all(source, build_model(read_config(tmp_path))), tensors)


def test_tied_embeddings_come_without_a_head_and_a_duplicate_is_dropped(tmp_path):
    fields, tensors = config_fields(tie_word_embeddings=True), hf_tensors(tied=True)
    plain = open_source(write_hf(tmp_path / "plain", fields, tensors)).load_outer()
    doubled = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    again = open_source(write_hf(tmp_path / "doubled", fields, doubled)).load_outer()
    assert set(plain) == set(again) == {"model"}
    chex.assert_trees_all_equal(plain, again)


@pytest.mark.parametrize("noted", [True, False])
def test_a_tied_checkpoint_may_hold_the_name_of_the_head_alone(tmp_path, noted):
    fields, tensors = config_fields(tie_word_embeddings=True), hf_tensors(tied=True)
    write_hf(tmp_path, fields, tensors)
    expected = trees.flatten(open_source(tmp_path).load_outer())
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    noted_names = {"model.embed_tokens.weight": "lm_head.weight"} if noted else None
    save_file(tensors, tmp_path / "model.safetensors", metadata=noted_names)
    chex.assert_trees_all_equal(trees.flatten(open_source(tmp_path).load_outer()), expected)


def test_a_tensor_of_two_names_is_found_by_both(tmp_path):
    tensors = hf_tensors()
    norms = [name for name in tensors if name.endswith("norm.weight")]
    stored = {name: array for name, array in tensors.items() if name not in norms[1:]}
    write_hf(tmp_path, config_fields(), stored)
    with pytest.raises(InputError, match="missing"):
        open_source(tmp_path)
    save_file(stored, tmp_path / "model.safetensors", metadata=dict.fromkeys(norms[1:], norms[0]) | {"format": "pt"})
    source = open_source(tmp_path)
    np.testing.assert_array_equal(source.load_outer()["model"]["norm"]["weight"], tensors[norms[0]])


def test_a_head_that_differs_beside_tied_embeddings_is_refused(tmp_path):
    tensors = hf_tensors(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    source = open_source(write_hf(tmp_path, config_fields(tie_word_embeddings=True), tensors))
    with pytest.raises(InputError, match=r"tie_word_embeddings.*lm_head\.weight differs"):
        source.load_outer()


def test_rotary_buffers_of_old_files_are_passed_over(tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(LAYERS)}
    open_source(write_hf(tmp_path, config_fields(), hf_tensors() | buffers))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(QUERY), rf"{QUERY} is missing"),
        (
            lambda t: t.update({"model.layers.0.mlp.router.weight": np.ones((2, 2), np.float32)}),
            r"mlp\.router\.weight \[2, 2\]",
        ),
        (
            lambda t: t.update({QUERY: np.ones((64, 60), np.float32)}),
            r"q_proj\.weight has shape \[64, 60\].*needs \[64, 64\]",
        ),
        (lambda t: t.update({QUERY: np.ones((64, 64), np.int8)}), rf"{QUERY} is int8"),
    ],
    ids=["missing", "unused", "misshapen", "integer"],
)
def test_a_wrong_set_of_tensors_is_named_at_construction(tmp_path, shards, change, expected):
    tensors = hf_tensors()
    change(tensors)
    folder = write_hf(tmp_path, config_fields(), tensors, shards=shards)
    with pytest.raises(InputError, match=expected):
        open_source(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_value_that_is_not_finite_is_refused_when_its_block_is_loaded(tmp_path, value, dtype):
    tensors = hf_tensors(dtype=dtype)
    tensors[QUERY][3, 5] = value
    source = open_source(write_hf(tmp_path, config_fields(), tensors))
    source.load_block(0)
    with pytest.raises(InputError, match=rf"{QUERY} holds 1 NaN or infinite values of 4096"):
        source.load_block(1)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_file_cut_short_is_refused_at_construction(tmp_path, kept):
    file = write_hf(tmp_path, config_fields(), hf_tensors()) / "model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    assert "model.safetensors" in refused(tmp_path)


def test_a_file_cut_short_while_open_is_refused_by_tensor(tmp_path):
    source = open_source(write_hf(tmp_path, config_fields(), hf_tensors()))
    os.truncate(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(InputError, match="fetch it again"):
        [source.load_block(i) for i in range(LAYERS)]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fill its bytes 0 … 4"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "integers from 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "does not fill"),
        ({"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}, "truncated"),
        ({"dtype": "F32", "shape": [2]}, "no dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}, "integers from 0"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "dtype 'F4'"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "dtype"),
        (7, "no dtype, shape and data_offsets"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, entry, expected):
    write_hf(tmp_path, config_fields(), hf_tensors())
    header = json.dumps({"lm_head.weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert expected in refused(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"{ ", b"\xff\xff", b"[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused(tmp_path, header):
    write_hf(tmp_path, config_fields(), hf_tensors())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "no safetensors file" in refused(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    folder = write_hf(tmp_path, config_fields(), hf_tensors(), shards=2)
    return folder, folder / "model.safetensors.index.json"


def test_a_missing_shard_is_named(sharded):
    folder, _ = sharded
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors, which is missing" in refused(folder)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "", "..", 3, "w.bin"]
)
def test_an_index_that_points_out_of_the_folder_is_refused(sharded, shard):
    folder, index = sharded
    value = json.loads(index.read_text())
    value["weight_map"][QUERY] = shard
    index.write_text(json.dumps(value))
    assert f"names the shard {shard!r}" in refused(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    folder, index = sharded
    value = json.loads(index.read_text())
    value["weight_map"]["model.layers.9.absent.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(value))
    assert "absent.weight, which it does not" in refused(folder)


def test_a_tensor_in_two_shards_is_refused(sharded):
    folder, index = sharded
    value = json.loads(index.read_text())["weight_map"]
    first = {n: a for n, a in hf_tensors().items() if value[n] == "model-00001-of-00002.safetensors"}
    other = next(n for n in value if n not in first)
    save_file(first | {other: hf_tensors()[other]}, folder / "model-00001-of-00002.safetensors")
    assert f"tensor {other} is in two shards" in refused(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_of_another_form_is_refused(sharded, text):
    folder, index = sharded
    index.write_text(text)
    assert "model.safetensors.index.json" in refused(folder)


def test_pickled_weights_are_refused_unopened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_fields()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    assert "never opened" in refused(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_fields()))
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "config.json"),
        ("{", "config.json"),
        ("[]", "config.json"),
        (json.dumps(config_fields("mamba")), "'mamba'"),
        (json.dumps({"hidden_size": 4}), "model_type"),
        (json.dumps(config_fields(quantization_config={"quant_method": "gptq"})), "'gptq'"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_in_one_line(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=expected):
        read_config(tmp_path)


def test_stop_tokens_of_the_generation_config_come_first(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_fields(eos_token_id=2)))
    assert read_config(tmp_path).eos_token_id == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_config(tmp_path).eos_token_id == (2, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5, "max_time": Infinity}')
    assert read_config(tmp_path).eos_token_id == (5,)


def test_the_fingerprint_holds_still_and_follows_a_change(tmp_path):
    folder = write_hf(tmp_path, config_fields(), hf_tensors())
    before = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == before
    stat = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_source(folder).fingerprint() != before
