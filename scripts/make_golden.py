"""Writes the golden checkpoint of the current format version, and prints what its test pins.

    python scripts/make_golden.py tests/fixtures/golden_v4
    python scripts/make_golden.py tests/fixtures/golden_v2 --tied

golden_v3 was made by the same program without what is carried, golden_v1 without trellises too; golden_v2 is golden_v1
with a codebook that two kernels have in common.

Run once per format version: what is committed stays as it was written, because it represents the checkpoints of users.
"""

import argparse
import dataclasses
import hashlib
import json
import pprint
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from cluscomp_jax.checkpoint.reader import save_checkpoint
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import Axis, Form, TrellisCoding, index_dtype, index_shape
from cluscomp_jax.io.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from cluscomp_jax.models.llama import LlamaConfig, LlamaModel
from cluscomp_jax.models.model import model_config_to_dict

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=True,
)

COMPRESSED: dict[str, tuple[int, int, Axis, Any]] = {
    "self_attn/q_proj/kernel": (4, 13, "out", ml_dtypes.bfloat16),
    "self_attn/o_proj/kernel": (3, 300, "in", np.float16),
    "mlp/up_proj/kernel": (5, 256, "out", np.float16),
    "mlp/down_proj/kernel": (8, 1, "out", ml_dtypes.bfloat16),
}
"""{kernel: (group size, codes, axis, dtype)}: both index widths, both axes, padding, one code, both dtypes."""

TRELLISES: dict[str, tuple[int, int, int, Axis, Any]] = {
    "self_attn/k_proj/kernel": (1, 64, 2, "out", np.float16),
    "self_attn/v_proj/kernel": (3, 32, 5, "in", ml_dtypes.bfloat16),
    "mlp/gate_proj/kernel": (2, 1024, 3, "out", np.float16),
}
"""{kernel: (group size, codes, step bits, axis, dtype)}: both axes, padding, windows that share bits and none."""


TIED = ("mlp/up_proj/kernel", "mlp/gate_proj/kernel")
"""(the kernel that stores a codebook, the one that has it in common with it) of the checkpoint of version 2."""


def make_params(*, tied: bool = False) -> trees.Params:
    """Returns the parameters: with trellises or, where `tied`, plain with a codebook of two kernels."""
    rng = np.random.default_rng(0)
    model = LlamaModel(CONFIG)
    flat = {path: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for path, shape in model.outer_shapes().items()}
    for path, shape in model.block_shapes(0).items():
        leaf: Any = rng.standard_normal(shape).astype(np.float32)
        if path in COMPRESSED:
            g, n, axis, dtype = COMPRESSED[path]
            d_in, d_out = shape
            index = rng.integers(0, n, index_shape((d_in, d_out), g, axis)).astype(index_dtype(n))
            leaf = CodebookArray(rng.standard_normal((n, g)).astype(dtype), index, (d_in, d_out), axis)
        if path in TRELLISES and not tied:
            leaf = random_trellis(rng, (shape[0], shape[1]), *TRELLISES[path])
        flat[f"{model.blocks_path}/0/{path}"] = leaf
    if tied:
        owner, other = (f"{model.blocks_path}/0/{path}" for path in TIED)
        index = rng.integers(0, flat[owner].num_codes, flat[owner].index.shape).astype(flat[owner].index.dtype)
        flat[other] = dataclasses.replace(flat[owner], index=index, tied_to=TIED[0])
    return trees.unflatten(flat)


def random_trellis(
    rng: np.random.Generator, shape: tuple[int, int], g: int, n: int, step_bits: int, axis: Axis, dtype: Any
) -> CodebookArray:
    coding, form = TrellisCoding(step_bits), Form(shape, n, g, axis)
    bits = rng.integers(0, 2, (form.lines, coding.index_bits(form) // form.lines))
    window = n.bit_length() - 1
    codes = np.lib.stride_tricks.sliding_window_view(bits, window, axis=1)[:, ::step_bits] @ (1 << np.arange(window))
    index = np.asarray(coding.index_of(form, codes if axis == "out" else codes.T))
    return CodebookArray(rng.standard_normal((n, g)).astype(dtype), index, shape, axis, coding=coding)


def digests(params: trees.Params) -> dict[str, str]:
    """Returns {path: SHA-256 of a parameter's bytes}; of a compressed one, of its codebook's and then its index's."""
    return {
        path: hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(leaf))).hexdigest()
        for path, leaf in sorted(trees.flatten(params).items())
    }


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"note": "carried along as it is"}\n', encoding="utf-8")


def write_carried(folder: Path) -> None:
    """Writes what is around the text model: an array of a dtype that no parameter has, and NaNs of two payloads."""
    tower = {
        "vision_tower.scale": np.array([0x7FC00000, 0x7FC12345, 0x3F800000], np.uint32).view(np.float32),
        "vision_tower.steps": np.array(7, np.int64),
    }
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tower.items()]
    with SafetensorsWriter(folder, specs, shard_bytes=1 << 20) as writer:
        for array in tower.values():
            writer.write(array)
    text = model_config_to_dict(CONFIG)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}), encoding="utf-8")
    (folder / "text_model.json").write_text('{"prefixes": [["language_model.", ""]]}\n', encoding="utf-8")


def main(out: Path, *, tied: bool) -> None:
    params = make_params(tied=tied)
    cfg = CompressConfig(model=CONFIG)
    provenance = {"source": "scripts/make_golden.py"}
    carried = None if tied else write_carried
    save_checkpoint(out, params, cfg, provenance=provenance, tokenizer=write_tokenizer, carried=carried)
    pprint.pprint(digests(params), width=120, sort_dicts=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the checkpoint; it must not exist")
    parser.add_argument("--tied", action="store_true", help="the checkpoint of version 2")
    options = parser.parse_args()
    main(options.out, tied=options.tied)
