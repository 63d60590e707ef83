"""What a checkpoint takes in memory against the bytes of its files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from forgery import forge

from cluscomp_jax import CompressConfig, llama
from cluscomp_jax.checkpoint import inventory, orbax_items
from cluscomp_jax.checkpoint.entries import MatrixEntry
from cluscomp_jax.checkpoint.fields import FileEntry
from cluscomp_jax.checkpoint.manifest import Contents
from cluscomp_jax.checkpoint.reader import describe, load_checkpoint, open_checkpoint, save_checkpoint
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime.atomic import file_sha256

EMBEDDING = "model/embed_tokens/embedding"
CHUNK = "rest/model.embed_tokens.embedding/0.0"


def tied(vocab_size):
    return llama.LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip


def constant(config):
    """Zeros everywhere, ones in norms."""
    model = llama.build(config)
    flat = {f"model/layers/0/{p}": s for p, s in model.block_shapes(0).items()} | model.outer_shapes()
    tree = {}
    for path, shape in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = (np.ones if "norm" in path else np.zeros)(shape, ml_dtypes.bfloat16)
    return tree


def zstd_of_zeros(size):
    """A zstd frame of blocks that repeat one byte: RFC 8878, magic, no content size, window of 2 MiB."""
    frame = bytearray(b"\x28\xb5\x2f\xfd\x00\x58")
    while size:
        block = min(size, 2**17)
        size -= block
        frame += struct.pack("<I", (block << 3) | (1 << 1) | (not size))[:3] + b"\x00"
    return bytes(frame)


def claim(root, rows):
    """Makes the embedding of a checkpoint one of `rows` rows of zeros, well-formed in every file."""
    zarray = root / "rest/model.embed_tokens.embedding/.zarray"
    fields = json.loads(zarray.read_text())
    fields.update(shape=[rows, 128], chunks=[rows, 128], compressor={"id": "zstd", "level": 1})
    zarray.write_text(json.dumps(fields))
    (root / CHUNK).write_bytes(zstd_of_zeros(rows * 256))

    def change(manifest):
        manifest["model_config"]["vocab_size"] = rows
        more = (rows - manifest["tensors"][EMBEDDING]["shape"][0]) * 128
        manifest["tensors"][EMBEDDING]["shape"][0] = rows
        manifest["totals"]["tensor_weights"] += more
        manifest["totals"]["tensor_bytes"] += 2 * more
        for name in (CHUNK, zarray.relative_to(root).as_posix()):
            manifest["files"][name] = {"size": (root / name).stat().st_size, "sha256": file_sha256(root / name)}
        manifest["totals"]["file_bytes"] = sum(file["size"] for file in manifest["files"].values())

    forge(root, change)


@pytest.fixture
def saved(tmp_path):
    config = tied(64)
    save_checkpoint(tmp_path / "out", constant(config), CompressConfig(model=config))
    return tmp_path / "out"


def test_a_small_file_that_claims_gibibytes_is_refused_before_it_is_read(saved, monkeypatch):
    claim(saved, 8_000_000)
    assert sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()) < 200_000
    monkeypatch.setattr(orbax_items, "read_item", lambda *_: pytest.fail("an item was read"))
    for refuse in (load_checkpoint, open_checkpoint, describe):
        with pytest.raises(InputError, match=r"rest has [\d,]+ bytes of files and would take 2,048,000,256 bytes") as e:
            refuse(saved)
        assert "\n" not in str(e.value)


def test_constants_within_the_allowance_load(saved):
    claim(saved, 200_000)  # 49 MiB of zeros
    assert not np.any(load_checkpoint(saved).params["model"]["embed_tokens"]["embedding"])


def test_an_index_that_has_no_bytes_on_disk_counts(tmp_path):
    one_code = MatrixEntry((2**14, 2**14), "out", 2, 1, "float16")
    files = {"blocks/00000/a": FileEntry(1000, "")}
    parts = {"blocks/00000": Contents({"a": one_code}, files)}
    with pytest.raises(InputError, match="would take 134,217,732 bytes of memory"):
        inventory.check_expansion(tmp_path, parts)
    inventory.check_expansion(tmp_path, {"blocks/00000": Contents({"a": one_code}, {"a": FileEntry(2**21, "")})})


def test_what_many_items_take_is_added_up(tmp_path):
    one_code = MatrixEntry((2**12, 2**12), "out", 1, 1, "float16")  # 16 MiB
    parts = {f"blocks/{i:05d}": Contents({"a": one_code}, {"a": FileEntry(1, "")}) for i in range(5)}
    inventory.check_expansion(tmp_path, dict(list(parts.items())[:3]))
    with pytest.raises(InputError, match=r"blocks/0000[34] has 1 bytes of files"):
        inventory.check_expansion(tmp_path, parts)
