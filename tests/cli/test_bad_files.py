"""Files and options that a hurried user gets wrong: one clear line each, exit code 2, nothing written or changed."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import tensors, write_model, write_text, write_tokenizer
from export_models import Run, make_params
from io_models import config_fields, hf_tensors, write_gguf, write_hf

from cluscomp_jax.checkpoint.reader import save_checkpoint
from cluscomp_jax.cli import main
from cluscomp_jax.models.llama.hf_config import parse_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
SAID = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}

TEXTS: dict[str, bytes] = {
    "empty.txt": b" \n",
    "latin.txt": "été".encode("latin-1"),
    "utf16.txt": "words".encode("utf-16"),
    "broken.gz": b"\x1f\x8b\x08 no gzip",
    "short.txt.gz": gzip.compress(b"words" * 40)[:-9],
    "table.csv": b"text\nwords\n",
    "table.parquet": b"PAR1",
    "one.json": b'{"text": "words"}',
    "empty.jsonl": b"\n\n",
    "broken.jsonl": b'{"text": "a"}\n{"text"',
    "list.jsonl": b"[1]\n",
    "keys.jsonl": b'{"prompt": "a"}\n',
    "mixed.jsonl": (json.dumps({"text": "a"}) + "\n" + json.dumps(SAID)).encode(),
    "talk.jsonl": json.dumps(SAID).encode(),
    "number.jsonl": b'{"text": 3}\n',
    "half.jsonl": b'{"text": "a\\ud800"}\n',
    "blank.jsonl": b'{"instruction": "a", "output": ""}\n',
    "few.jsonl": b'{"text": "abc"}\n',
    "junk.npy": b"no numpy",
    "bad.toml": b"[tuning\n",
    "latin.toml": "# été".encode("latin-1"),
    "type.toml": b'[tuning]\nepochs = "many"\n',
    "unknown.toml": b"[tunning]\nepochs = 2\n",
    "finetune.toml": b"[training]\nstep = 2\n",
}
ARRAYS: dict[str, Any] = {
    "floats.npy": np.ones(64),
    "matrix.npy": np.ones((8, 8), np.int32),
    "negative.npy": np.full(64, -1),
    "objects.npy": np.array([{}] * 64, dtype=object),
    "large.npy": np.full(64, 77),
}


def model(folder: Path, **files: str | None) -> None:
    """A good model but for these files; None: the file is missing."""
    write_model(folder)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)


def checkpoint(folder: Path, **changes: Any) -> Path:
    write_tokenizer_of(folder)
    save_checkpoint(
        folder, make_params(), Run(parse_config(config_fields())), tokenizer=folder.with_suffix(".tokenizer"), **changes
    )
    return folder


def write_tokenizer_of(folder: Path) -> None:
    folder.with_suffix(".tokenizer").mkdir(parents=True)
    write_tokenizer(folder.with_suffix(".tokenizer"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    for name, content in TEXTS.items():
        (place / name).write_bytes(content)
    for name, array in ARRAYS.items():
        np.save(place / name, array, allow_pickle=True)
    np.savez(place / "several", a=np.ones(3, int))
    (place / "several.npz").rename(place / "several.npy")
    write_text(place / "text.txt", 600)
    write_model(place / "model")
    tokenizer = json.loads((place / "model" / "tokenizer.json").read_text())
    model(place / "lfs", model__safetensors=POINTER)
    model(place / "lfs-tokenizer", tokenizer__json=POINTER)
    model(place / "lfs-config", config__json=POINTER)
    model(place / "junk-tokenizer", tokenizer__json='{"model": 3}')
    model(place / "tiktoken", tokenizer__json=None, tokenizer__model="IQ== 0\nIg== 1\n")
    model(place / "no-end", tokenizer_config__json='{"eos_token": "<end>"}')
    model(place / "template", tokenizer_config__json='{"chat_template": 7}')
    model(place / "raises", tokenizer_config__json='{"chat_template": "{{ raise_exception(\'no\') }}"}')
    model(place / "code", tokenizer__json=None, tokenizer_config__json='{"auto_map": {"AutoTokenizer": ["a.B", null]}}')
    model(place / "list-config", config__json="[]")
    model(place / "nan-config", config__json=json.dumps(config_fields()).replace("1e-05", "NaN"))
    model(place / "no-config", config__json=None)
    model(place / "pickled", model__safetensors=None, pytorch_model__bin="pickle")
    index = {"weight_map": {"model.norm.weight": "../text.txt.safetensors"}}
    model(place / "outside", model__safetensors=None, model__safetensors__index__json=json.dumps(index))
    write_hf(place / "mute", config_fields(), tensors())
    tokenizer["model"]["vocab"] |= {"é": 43}
    model(place / "larger", tokenizer__json=json.dumps(tokenizer))
    (place / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (place / "pointer.gguf").write_text(POINTER)
    (place / "weights.pth").write_bytes(b"PK")
    write_gguf(place / "plain.gguf", hf_tensors())
    write_gguf(place / "part-00001-of-00002.gguf", hf_tensors(), metadata=lambda w: w.add_uint16("split.count", 2))
    checkpoint(place / "c")
    checkpoint(place / "other", provenance={"tokenizer": "1" * 64})
    checkpoint(place / "another", provenance={"tokenizer": "2" * 64})
    damage(place)
    return place


def damage(place: Path) -> None:
    """Checkpoints that are not whole."""
    for name in ("cut", "missing", "extra", "newer", "changed"):
        checkpoint(place / name)
    manifest = place / "cut" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    next((place / "missing" / "blocks").rglob("0")).unlink()
    (place / "extra" / "blocks" / "notes.txt").write_text("mine")
    newer = json.loads((place / "newer" / "manifest.json").read_text())
    (place / "newer" / "manifest.json").write_text(json.dumps(newer | {"format_version": 99}))
    changed = next((place / "changed" / "blocks").rglob("0"))
    changed.write_bytes(bytes(len(changed.read_bytes())))


EVALUATE = "evaluate {}/model --context 8 --text {}/"
TRAIN = "finetune {}/c --length 8 --steps 1 --out {}/out --data {}/"
CALIBRATE = "compress {}/model --num-codes 4 --length 8 --samples 2 --out {}/out --calibration {}/"
CASES: list[tuple[str, list[str]]] = [
    *((f"{EVALUATE}{name}", [name]) for name in (
        "empty.txt", "latin.txt", "utf16.txt", "broken.gz", "short.txt.gz", "table.csv", "table.parquet", "one.json",
        "empty.jsonl", "broken.jsonl", "list.jsonl", "keys.jsonl", "mixed.jsonl", "talk.jsonl", "number.jsonl",
        "half.jsonl", "blank.jsonl", "few.jsonl", "junk.npy", "floats.npy", "matrix.npy", "negative.npy", "objects.npy",
        "several.npy", "large.npy", "absent.txt", "absent.npy", "absent.jsonl",
    )),
    *((f"{CALIBRATE}{name}", [name]) for name in (
        "latin.txt", "table.csv", "one.json", "broken.jsonl", "talk.jsonl", "blank.jsonl", "large.npy", "objects.npy",
    )),
    *((f"{TRAIN}{name}", [name]) for name in (
        "empty.txt", "latin.txt", "table.csv", "one.json", "empty.jsonl", "broken.jsonl", "list.jsonl", "keys.jsonl",
        "mixed.jsonl", "talk.jsonl", "number.jsonl", "half.jsonl", "blank.jsonl", "few.jsonl", "floats.npy",
        "large.npy", "absent.jsonl",
    )),
    (f"{TRAIN}text.txt --too-long skip", ["text.txt", "too_long 'skip' has no effect"]),
    (f"{TRAIN}text.txt --unusable skip", ["text.txt", "unusable 'skip' has no effect"]),
    (f"{TRAIN}text.txt --responses-only", ["text.txt", "responses_only"]),
    (f"{TRAIN}text.txt --config {{}}/finetune.toml", ["finetune.toml", "'training.step'"]),
    (f"{TRAIN}text.txt --trainable nothing", ["nothing"]),
    (f"{TRAIN}text.txt --evaluate-every 2", ["--evaluate-every 2", "--evaluation"]),
    (f"{TRAIN}text.txt --result best", ["best", "--evaluation"]),
    ("finetune {}/c --length 8 --steps 1 --out {}/c --data {}/text.txt", ["--out", "choose another folder"]),
    *((f"evaluate {{}}/{name} --context 8 --text {{}}/text.txt", named) for name, named in {
        "lfs": ["model.safetensors", "Git LFS"],
        "lfs-tokenizer": ["tokenizer.json", "Git LFS"],
        "lfs-config": ["config.json", "Git LFS"],
        "junk-tokenizer": ["tokenizer.json", "cannot be read"],
        "tiktoken": ["tokenizer.model", "fetch tokenizer.json"],
        "no-end": ["eos_token is '<end>'"],
        "template": ["chat_template"],
        "code": ["auto_map", "never run"],
        "list-config": ["config.json", "list"],
        "nan-config": ["config.json", "NaN"],
        "no-config": ["no-config", "config.json"],
        "pickled": ["pickled weights"],
        "outside": ["../text.txt.safetensors"],
        "mute": ["no tokenizer"],
        "short.gguf": ["short.gguf", "not a whole GGUF"],
        "pointer.gguf": ["Git LFS"],
        "plain.gguf": ["plain.gguf", "no tokenizer"],
        "part-00001-of-00002.gguf": ["part-00002-of-00002.gguf", "missing"],
        "weights.pth": ["weights.pth", "not GGUF"],
        "cut": ["manifest.json"],
        "missing": ["blocks"],
        "extra": ["notes.txt"],
        "newer": ["99"],
        "changed": ["blocks"],
        "absent": ["absent"],
    }.items()),
    *((f"{command} {{}}/{name}", [named]) for command in ("inspect", "report") for name, named in (
        ("model", "manifest.json"), ("cut", "manifest.json"), ("newer", "99"), ("absent", "absent"),
    )),
    ("inspect {}/changed --verify", ["blocks"]),
    ("compare {}/c", ["two folders"]),
    ("compare {}/other {}/another", ["two tokenizers", "111111111111", "222222222222"]),
    ("import {}/model --out {}/out", ["no AQLM model", "compress"]),
    ("import {}/c --out {}/out", ["no AQLM model", "already"]),
    ("export {}/model --format dense --out {}/out", ["manifest.json"]),
    ("export {}/c --format dense --out {}/model", ["model"]),
    ("export {}/c --format orbax-codebook --dtype float16 --out {}/out", ["dtype float16 has no effect"]),
    ("export {}/c --format dense --code-bits 8 --out {}/out", ["code bits 8 has no effect"]),
    ("export {}/c --format orbax --shard-gb 2 --out {}/out", ["--shard-gb 2.0 has no effect"]),
    ("export {}/c --format dense --shard-gb 0 --out {}/out", ["--shard-gb 0.0"]),
    ("export {}/c --format aqlm --code-bits 4 --out {}/out", ["4"]),
    ("generate {}/raises --chat --prompt a", ["--chat", "no"]),
    ("generate {}/model --chat --prompt a", ["chat template"]),
    ("generate {}/larger --prompt é", ["43", "39"]),
    ("generate {}/model --prompt a --seed 3", ["--seed 3 has no effect"]),
    ("generate {}/model --prompt a --temperature -1", ["temperature is -1"]),
    ("generate {}/model --prompt a --temperature 1 --top-p 2", ["top_p is 2"]),
    ("generate {}/model --prompt a --repetition-penalty 0", ["repetition_penalty"]),
    ("evaluate {}/model --context 8 --text {}/text.txt --record {}/model", ["manifest.json"]),
    ("evaluate {}/model --context 8 --text {}/text.txt --record {}/c", ["--record", "leave --record out"]),
    *((f"compress {{}}/model --out {{}}/out --config {{}}/{name}", [name]) for name in (
        "bad.toml", "latin.toml", "type.toml", "unknown.toml", "absent.toml",
    )),
    ("compress {}/model --out {}/model --num-codes 4", ["model"]),
    ("compress {}/c --out {}/out --num-codes 4", ["compressed"]),
    ("plan nonsense --target h100", ["nonsense"]),
    ("plan llama-2-7b --target nonsense", ["nonsense"]),
]  # fmt: skip


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found


def test_there_are_enough() -> None:
    assert len(CASES) >= 120


@pytest.mark.parametrize(("command", "named"), CASES, ids=[command for command, _ in CASES])
def test_a_wrong_file_or_option(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: Path,
    command: str,
    named: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "TMPDIR", str(tmp_path))
    before = snapshot(place)
    assert main(command.replace("{}", str(place)).split()) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("cluscomp: error: ")]
    assert (out, len(lines)) == ("", 1)
    assert err.endswith(f"{lines[0]}\n")
    assert all(name in lines[0] for name in named), lines[0]
    assert snapshot(place) == before
    assert not list(tmp_path.iterdir())
