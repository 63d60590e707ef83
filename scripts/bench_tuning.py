"""Times one block-wise tuning step (forward, backward, AdamW on the codebooks) next to the same step in PyTorch.

Both run on the same block of the same shape, the same codes, tokens, threads and float32, in turn in one
process, and their losses are compared first. Prints a table; asserts nothing but that the losses agree.

    pip install ".[parity]" && python scripts/bench_tuning.py
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from cluscomp_jax import llama
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.runtime.host_memory import keep_freed_memory
from cluscomp_jax.tuning.blockwise import init_state, split_trainable, tuning_step
from smollm2_shapes import SMOLLM2_135M, random_codes

ONE_BLOCK = SMOLLM2_135M | {"num_hidden_layers": 1}


def random_block(model: Any, *, g: int, num_codes: int) -> dict[str, Any]:
    """A block of random weights in which every kernel is a CodebookArray."""
    rng = np.random.default_rng(0)
    kernels = {path for paths in model.input_groups.values() for path in paths}
    flat: dict[str, Any] = {}
    for path, shape in model.block_shapes(0).items():
        if path not in kernels:
            flat[path] = jnp.ones(shape)
            continue
        flat[path] = jax.tree.map(jnp.asarray, random_codes(rng, shape, g=g, num_codes=num_codes))
    return trees.unflatten(flat)


def jax_step(model: Any, block: Any, x: np.ndarray, y: np.ndarray, rate: float) -> Callable[[], float]:
    settings = BlockTuningConfig(learning_rate=rate, relative_rate=False, schedule="constant", weight_decay=0.1)
    codebooks, frozen = split_trainable(block, norms=False)
    state = init_state(codebooks, settings=settings, total_steps=1000)
    inputs, target = jnp.asarray(x), jnp.asarray(y)

    def step() -> float:
        nonlocal state
        state, loss = tuning_step(
            state,
            frozen,
            inputs,
            target,
            model=model,
            layer_type=model.layer_type(0),
            settings=settings,
            total_steps=1000,
        )
        return float(loss)

    return step


def torch_step(fields: dict[str, Any], block: Any, x: np.ndarray, y: np.ndarray, rate: float) -> Callable[[], float]:
    config = transformers.LlamaConfig(**{k: v for k, v in fields.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0)
    rotary = LlamaRotaryEmbedding(config)
    flat = trees.flatten(block)
    arrays = {path: leaf for path, leaf in flat.items() if isinstance(leaf, CodebookArray)}
    codebooks = {path: torch.nn.Parameter(torch.tensor(np.asarray(leaf.codebook))) for path, leaf in arrays.items()}
    indices = {path: torch.tensor(np.asarray(leaf.index).astype(np.int64)) for path, leaf in arrays.items()}
    optimizer = torch.optim.AdamW(codebooks.values(), lr=rate, weight_decay=0.1, fused=True)
    inputs, target = torch.tensor(x), torch.tensor(y)
    positions = rotary(inputs, torch.arange(x.shape[1])[None])

    def step() -> float:
        weights = {
            path.replace("/", ".").removesuffix("kernel") + "weight": torch.nn.functional.embedding(
                indices[path], codebooks[path]
            )
            .reshape(leaf.shape[0], -1)[:, : leaf.shape[1]]
            .T
            for path, leaf in arrays.items()
        }
        output = torch.func.functional_call(layer, weights, (inputs,), {"position_embeddings": positions})
        output = output[0] if isinstance(output, tuple) else output
        loss = torch.nn.functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--g", type=int, default=4)
    parser.add_argument("--num-codes", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model = llama.build(llama.parse_config(ONE_BLOCK))
    block = random_block(model, g=options.g, num_codes=options.num_codes)
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((1, options.tokens, 576)).astype(np.float32) for _ in range(2))
    steps = {
        "cluscomp_jax": jax_step(model, block, x, y, 0.002),
        "PyTorch": torch_step(ONE_BLOCK, block, x, y, 0.002),
    }
    for _ in range(3):
        losses = {name: step() for name, step in steps.items()}
    np.testing.assert_allclose(losses["cluscomp_jax"], losses["PyTorch"], rtol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        for name, step in steps.items():
            time.sleep(0.02)  # the other's threads spin on for a while after their work
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(
        f"SmolLM2-135M block, {options.tokens} tokens, g={options.g}, n={options.num_codes}, {options.threads} threads"
    )
    print(f"jax {jax.__version__}, torch {torch.__version__}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:14s} median {median * 1e3:7.1f} ms   range {min(times) * 1e3:.1f} to {max(times) * 1e3:.1f} ms")
    ratios = sorted(b / a for a, b in zip(seconds["cluscomp_jax"], seconds["PyTorch"], strict=True))
    print(
        f"PyTorch / cluscomp_jax, pair by pair: median {statistics.median(ratios):.2f}, "
        f"range {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )


if __name__ == "__main__":
    main()
