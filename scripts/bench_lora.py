"""Finetuning by codebooks alone, and LoRA with as many trained numbers: on our compressed model, and on a 3-bit copy.

    cluscomp demo --fetch
    python scripts/make_instructions.py --out data
    python scripts/bench_lora.py --compressed FOLDER --data data/sentences-train.jsonl --test data/sentences-test.jsonl

All run through the same step, optimiser, schedule, rows and order, at every rate of their scan; a line for each.
LoRA (Hu et al., 2021, arXiv 2106.09685) adds x A B to the query and value projections, A drawn at random, B zero, no
dropout, scale one (its rate is scanned). The copy is the original rounded to nearest: 3 bits, groups of 64 inputs, a
16-bit scale and a zero point each, 3.30 bits per weight.
"""

import argparse
import dataclasses
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.trees import Params
from cluscomp_jax.finetuning import finetune_stream
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.source import DictSink, DictSource, load_all
from cluscomp_jax.runtime.host_memory import keep_freed_memory
from cluscomp_jax.runtime.reporter import to_json
from cluscomp_jax.text.token_rows import TokenRows
from cluscomp_jax.text.training_data import read_examples

TARGETS = ("self_attn/q_proj", "self_attn/v_proj")
BITS, GROUP = 3, 64


@dataclasses.dataclass(frozen=True)
class LoraModel:
    """A Model whose target kernels are W + A B: lora_a [d_in, rank] and lora_b [rank, d_out] are parameters too."""

    base: Any
    rank: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def block_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """{path: shape}, adapters among them."""
        shapes = dict(self.base.block_shapes(i))
        for target in TARGETS:
            d_in, d_out = shapes[f"{target}/kernel"]
            shapes |= {f"{target}/lora_a": (d_in, self.rank), f"{target}/lora_b": (self.rank, d_out)}
        return shapes

    def block(self, params: Params, x: jax.Array, *, layer_type: Hashable, observer: Any = None) -> Any:
        """y [b, t, d] of x [b, t, d], as `Model.block`."""
        flat = trees.flatten(params)
        for target in TARGETS:
            kernel, a, b = (flat.pop(f"{target}/{name}") for name in ("kernel", "lora_a", "lora_b"))
            dense = decode(kernel) if isinstance(kernel, CodebookArray) else kernel
            flat[f"{target}/kernel"] = dense.astype(x.dtype) + (a @ b).astype(x.dtype)
        return self.base.block(trees.unflatten(flat), x, layer_type=layer_type, observer=observer)


def with_adapters(params: Params, model: LoraModel, seed: int) -> Params:
    """Returns the parameters with adapters that change nothing yet."""
    rng = np.random.default_rng(seed)
    flat = trees.flatten(params)
    for i in range(model.num_blocks):
        for path, shape in model.block_shapes(i).items():
            if path.endswith("/lora_a"):
                flat[f"{model.blocks_path}/{i}/{path}"] = rng.uniform(-1, 1, shape).astype(np.float32) * np.float32(
                    shape[0] ** -0.5
                )
            elif path.endswith("/lora_b"):
                flat[f"{model.blocks_path}/{i}/{path}"] = np.zeros(shape, np.float32)
    return trees.unflatten(flat)


def rounded(kernel: np.ndarray) -> np.ndarray:
    """Returns the kernel [d_in, d_out] on the nearest points of asymmetric grids, each of GROUP inputs of an output."""
    last = 2**BITS - 1
    parts = []
    for group in np.split(kernel.astype(np.float32), range(GROUP, len(kernel), GROUP)):
        low, high = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
        scale = np.maximum((high - low) / last, 2.0**-24).astype(np.float16).astype(np.float32)
        zero = np.clip(np.round(-low / scale), 0, last)
        parts.append(scale * (np.clip(np.round(group / scale) + zero, 0, last) - zero))
    return np.concatenate(parts)


def three_bits(params: Params, model: Model) -> Params:
    kernels = {path for paths in model.input_groups.values() for path in paths}
    return trees.map_by_path(
        lambda path, leaf: (
            rounded(np.asarray(leaf)) if path.removeprefix("model/layers/").partition("/")[2] in kernels else leaf
        ),
        params,
    )


def rows(opened: OpenedModel, path: Path, options: argparse.Namespace) -> TokenRows:
    settings = DataConfig(length=options.length, responses_only=True, too_long="skip")
    return read_examples(path, opened.load_tokenizer(), settings, vocab_size=opened.config.vocab_size)


def contestants(options: argparse.Namespace) -> Iterator[tuple[str, Params, Any, str, list[float]]]:
    """Yields (name, parameters, model, what trains, rates)."""
    compressed, original = open_model(options.compressed), open_model(find_model())
    ours = load_all(compressed.source, compressed.model)
    adapted = LoraModel(compressed.model, options.rank)
    if "codebooks" in options.methods:
        yield "codebooks", ours, compressed.model, ".*/codebook", options.rates
    if "lora" in options.methods:
        yield "LoRA, ours", with_adapters(ours, adapted, 0), adapted, ".*/lora_[ab]", options.lora_rates
    if "lora3" in options.methods:
        copy = three_bits(load_all(original.source, original.model), original.model)
        yield "LoRA, int3 group 64", with_adapters(copy, adapted, 0), adapted, ".*/lora_[ab]", options.lora_rates


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--lora-rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--test-rows", type=int, default=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--compressed", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["codebooks", "lora", "lora3"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    add_common_arguments(parser)
    options = parser.parse_args()
    keep_freed_memory()
    opened = open_model(options.compressed)
    train, test = rows(opened, options.data, options), rows(opened, options.test, options)
    test = test.take(np.arange(min(options.test_rows, len(test))))
    for name, params, model, trainable, rates in contestants(options):
        for rate in rates:
            training = TrainingConfig(
                steps=options.steps, batch_size=options.batch_size, learning_rate=rate, relative_rate=False,
                trainable=(trainable,), remat_policy="cheap",
            )  # fmt: skip
            cfg = FinetuneConfig(model=model, training=training)
            summary = finetune_stream(DictSource(params, model), DictSink(), train, cfg, evaluation=test)
            before, after = (found["nll"] for found in (summary.evaluations[0], summary.evaluations[-1]))
            numbers = {"trained": summary.trained_parameters, "rate": rate, "before": before, "after": after}
            print(to_json({"method": name, **numbers, "seconds": summary.seconds}), flush=True)


if __name__ == "__main__":
    main()
