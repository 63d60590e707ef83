"""Small compressed Llamas for the tests of exports: random codes in the shapes of `cli_models`, saved."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cli_models import tensors, write_tokenizer
from io_models import config_fields

from cluscomp_jax.checkpoint.reader import CheckpointSource, open_checkpoint, save_checkpoint
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.llama import LlamaConfig, parse_config


@dataclasses.dataclass(frozen=True)
class Run:
    """A run config with nothing but what a checkpoint records of it."""

    model: LlamaConfig

    def to_dict(self) -> dict[str, Any]:
        return {"seed": 3}


def coded(
    rng: np.random.Generator, shape: tuple[int, int], *, g: int, n: int, axis: Any = "out", dtype: Any = np.float16
) -> CodebookArray:
    d_in, d_out = shape
    index_shape = (d_in, -(-d_out // g)) if axis == "out" else (-(-d_in // g), d_out)
    index = rng.integers(0, n, index_shape).astype(np.uint8 if n <= 256 else np.uint16)
    index.flat[0] = n - 1
    return CodebookArray((0.1 * rng.standard_normal((n, g))).astype(dtype), index, shape, axis)


def make_params(*, g: int = 4, n: int = 300, axis: Any = "out", tied: bool = False, bias: bool = False) -> Params:
    """FlaxLlama parameters whose projections are codes and whose other parameters are bfloat16."""
    rng = np.random.default_rng(g + n)
    flat: dict[str, Any] = {}
    for name, array in tensors(tied=tied, attention_bias=bias, mlp_bias=bias).items():
        path = name.replace(".", "/")
        if "_proj.weight" in name:
            flat[path.replace("/weight", "/kernel")] = coded(rng, array.T.shape, g=g, n=n, axis=axis)
        elif name == "lm_head.weight":
            flat["lm_head/kernel"] = np.ascontiguousarray(array.T).astype(ml_dtypes.bfloat16)
        else:
            renamed = path.replace("embed_tokens/weight", "embed_tokens/embedding")
            flat[renamed] = array.astype(ml_dtypes.bfloat16)
    return trees.unflatten(flat)


def save(path: Path, params: Params, **changes: Any) -> CheckpointSource:
    config = parse_config(config_fields(**changes))
    tokenizer = path.parent / f"{path.name}-tokenizer"
    tokenizer.mkdir(parents=True)
    write_tokenizer(tokenizer)
    perplexity = {"compressed": {"perplexity": 12.5, "windows": 4, "context": 16}}
    provenance = {
        "model": {"name": "owner/tiny", "kind": "hf"},
        "calibration": {"name": "text.txt", "shape": [4, 16]},
        "versions": {"jax": "1.2.3"},
        "command": "cluscomp compress tiny --out tiny-small",
    }
    save_checkpoint(
        path, params, Run(config), tokenizer=tokenizer, provenance=provenance, metrics={"perplexity": perplexity}
    )
    return open_checkpoint(path)


def decoded(leaf: Any) -> np.ndarray:
    """What a parameter stands for, looked up here in NumPy alone."""
    if not isinstance(leaf, CodebookArray):
        return np.asarray(leaf)
    d_in, d_out = leaf.shape
    out = np.empty((leaf.index.shape[0] * leaf.codebook.shape[1], d_out), leaf.codebook.dtype)
    if leaf.axis == "out":
        return leaf.codebook[leaf.index].reshape(d_in, -1)[:, :d_out]
    for t in range(leaf.codebook.shape[1]):
        out[t :: leaf.codebook.shape[1]] = leaf.codebook[leaf.index, t]
    return out[:d_in]
