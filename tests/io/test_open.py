import dataclasses
import hashlib
import json
from typing import Any

import chex
import huggingface_hub
import numpy as np
import pytest
from io_models import config_fields, hf_tensors, write_gguf, write_hf

from cluscomp_jax.checkpoint.reader import save_checkpoint
from cluscomp_jax.checkpoint.writer import TOKENIZER_FILES
from cluscomp_jax.errors import InputError
from cluscomp_jax.io import open as opening
from cluscomp_jax.io.gguf.source import GgufSource
from cluscomp_jax.io.open import open_model


def test_a_hugging_face_folder_opens(tmp_path):
    folder = write_hf(tmp_path / "tiny", config_fields(), hf_tensors(), shards=2)
    opened = open_model(folder)
    assert (opened.kind, opened.name) == ("hf", "tiny")
    assert opened.model.num_blocks == opened.config.num_hidden_layers == 2
    assert opened.source.load_block(0)["mlp"]["up_proj"]["kernel"].shape == (64, 96)
    assert [entry["name"] for entry in opened.origin["files"]] == [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    json.dumps(opened.origin)


def test_a_gguf_file_and_the_folder_it_came_from_give_the_same_parameters(tmp_path):
    tensors = hf_tensors()
    folder = open_model(write_hf(tmp_path / "tiny", config_fields(), tensors))
    file = open_model(write_gguf(tmp_path / "tiny.gguf", tensors))
    assert file.kind == "gguf"
    exact = GgufSource(tmp_path / "tiny.gguf", dtype=np.float32)
    for i in range(2):
        chex.assert_trees_all_equal(folder.source.load_block(i), exact.load_block(i))
    chex.assert_trees_all_equal(folder.source.load_outer(), exact.load_outer())
    assert folder.config == file.config


@dataclasses.dataclass(frozen=True)
class Run:
    model: Any

    def to_dict(self):
        return {}


def test_a_compressed_checkpoint_opens(tmp_path):
    dense = open_model(write_hf(tmp_path / "dense", config_fields(), hf_tensors()))
    save_checkpoint(tmp_path / "small", dense.source, Run(dense.config))
    opened = open_model(tmp_path / "small")
    assert (opened.kind, opened.name, opened.config) == ("compressed", "small", dense.config)
    chex.assert_trees_all_equal(opened.source.load_block(1), dense.source.load_block(1))
    assert [entry["name"] for entry in opened.origin["files"]] == ["manifest.json"]
    with pytest.raises(InputError, match="carries no tokenizer"):
        opened.load_tokenizer()


def test_the_origin_names_sizes_and_digests(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", hf_tensors())
    raw = path.read_bytes()
    expected = {"name": "tiny.gguf", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert open_model(path).origin == {"name": "tiny.gguf", "kind": "gguf", "files": [expected]}
    monkeypatch.setattr(opening, "_HASHED_BYTES", len(raw))
    (sampled,) = open_model(path).origin["files"]
    assert sampled.keys() == {"name", "bytes", "sampled_sha256"}
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))  # another model of the same name and size
    assert open_model(path).origin["files"] != [sampled]


def test_a_hub_id_is_downloaded_without_pickles_and_code(tmp_path, monkeypatch):
    folder = write_hf(tmp_path / "snapshot", config_fields(), hf_tensors())
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_model("owner/tiny-model")
    assert (opened.kind, opened.name, asked["repo_id"]) == ("hf", "owner/tiny-model", "owner/tiny-model")
    wanted = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            *TOKENIZER_FILES,
            "pytorch_model.bin",
            "modeling_x.py",
            "consolidated.safetensors",
            "original/model.safetensors",
        ],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(wanted) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        *TOKENIZER_FILES,
    ]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def download(repo_id, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand nothing cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        InputError,
        match=r"'owner/absent' is no folder.*does not answer, and nothing is cached; give a local",
    ):
        open_model("owner/absent")


@pytest.mark.parametrize("name", ["absent", "a/b/c", "../absent/x y", ""])
def test_what_names_no_model_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="neither"):
        open_model(name)


def test_other_files_and_folders_are_refused_with_a_hint(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="not GGUF"):
        open_model(tmp_path / "weights.bin")
    (tmp_path / "weights.gguf").write_bytes(b"x")
    with pytest.raises(InputError, match=r"name the file itself: weights\.gguf"):
        open_model(tmp_path)
