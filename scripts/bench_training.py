"""Times one finetuning step of a whole SmolLM2-135M (codebooks alone train) next to the same step in PyTorch.

Random weights of its shapes, the same codes, tokens, threads and float32; in turn in one process, their losses compared
first. Peak memory is that of a process for each. Asserts nothing but that the losses agree.

    pip install ".[parity]" && python scripts/bench_training.py
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax import llama
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.model import parameter_shapes
from cluscomp_jax.models.source import DictSource
from cluscomp_jax.runtime.host_memory import keep_freed_memory
from cluscomp_jax.training import init_state, split_params, train_step
from smollm2_shapes import SMOLLM2_135M, random_codes

RATE = 0.001
NAMES = ("cluscomp_jax", "PyTorch")


def random_params(model: Any, *, g: int, num_codes: int) -> dict[str, Any]:
    """Returns {path: array} in which every kernel of a block is a CodebookArray."""
    rng = np.random.default_rng(0)
    kernels = {path for paths in model.input_groups.values() for path in paths}
    flat: dict[str, Any] = {}
    for path, shape in parameter_shapes(model).items():
        if path.removeprefix("model/layers/").partition("/")[2] in kernels:
            flat[path] = random_codes(rng, shape, g=g, num_codes=num_codes)
        elif len(shape) > 1:
            flat[path] = 0.02 * rng.standard_normal(shape).astype(np.float32)
        else:
            flat[path] = np.ones(shape, np.float32)
    return flat


def jax_step(model: Any, flat: dict[str, Any], tokens: np.ndarray, remat_policy: Any) -> Callable[[], float]:
    settings = TrainingConfig(
        learning_rate=RATE, relative_rate=False, schedule="constant", warmup_fraction=0.0, remat_policy=remat_policy
    )
    trained, frozen, layout = split_params(DictSource(trees.unflatten(flat), model), model, settings.trainable)
    state = init_state(trained, settings=settings)
    loss_mask = jnp.ones((1, *tokens.shape), bool)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, tokens[None], loss_mask, layout=layout, settings=settings)
        return float(metrics.loss)

    return step


def torch_step(flat: dict[str, Any], tokens: np.ndarray, threads: int) -> Callable[[], float]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.LlamaConfig(**{k: v for k, v in SMOLLM2_135M.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(config)
    network.model.rotary_emb = type(network.model.rotary_emb)(config)
    codebooks, indices, fixed = {}, {}, {}
    for path, leaf in flat.items():
        if isinstance(leaf, CodebookArray):
            codebooks[path] = torch.nn.Parameter(torch.tensor(leaf.codebook))
            indices[path] = torch.tensor(leaf.index.astype(np.int32))
        else:
            fixed[path.replace("/", ".").replace("embedding", "weight")] = torch.tensor(leaf)
    optimizer = torch.optim.AdamW(codebooks.values(), lr=RATE, weight_decay=0.0, fused=True)
    inputs = torch.tensor(tokens, dtype=torch.long)

    def step() -> float:
        weights = dict(fixed) | {"lm_head.weight": fixed["model.embed_tokens.weight"]}
        for path, codebook in codebooks.items():
            d_in, d_out = flat[path].shape
            decoded = torch.nn.functional.embedding(indices[path], codebook).reshape(d_in, -1)[:, :d_out]
            weights[path.replace("/", ".").removesuffix("kernel") + "weight"] = decoded.T
        logits = torch.func.functional_call(network, weights, (inputs,), {"use_cache": False}).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(codebooks.values()), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def make_step(name: str, options: argparse.Namespace) -> Callable[[], float]:
    model = llama.build(llama.parse_config(SMOLLM2_135M))
    flat = random_params(model, g=options.g, num_codes=options.num_codes)
    tokens = np.random.default_rng(1).integers(0, SMOLLM2_135M["vocab_size"], (1, options.tokens)).astype(np.int32)
    if name == "PyTorch":
        return torch_step(flat, tokens, options.threads)
    keep_freed_memory()
    return jax_step(model, flat, tokens, options.remat_policy)


def peak_mib(name: str, options: argparse.Namespace) -> float:
    """Returns the largest resident size of this process, after two steps in it."""
    step = make_step(name, options)
    for _ in range(2):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--g", type=int, default=4)
    parser.add_argument("--num-codes", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--recompute", choices=("all", "cheap"), default="cheap")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_mib, (name, options)) for name in NAMES}
    steps = {name: make_step(name, options) for name in NAMES}
    for _ in range(2):
        losses = {name: step() for name, step in steps.items()}
    np.testing.assert_allclose(losses["cluscomp_jax"], losses["PyTorch"], rtol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        for name, step in steps.items():
            time.sleep(0.05)  # the other's threads spin on for a while after their work
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(f"SmolLM2-135M, {json.dumps(vars(options))}, jax {jax.__version__}, {NAMES[1]} {_torch_version()}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:14s} median {median:6.2f} s ({options.tokens / median:.0f} tokens/s)   "
            f"range {min(times):.2f} to {max(times):.2f} s   peak of its process {peaks[name]:,.0f} MiB"
        )
    ratios = sorted(b / a for a, b in zip(*(seconds[name] for name in NAMES), strict=True))
    print(
        f"PyTorch / cluscomp_jax, pair by pair: median {statistics.median(ratios):.2f}, range {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}; peak memory {peaks['cluscomp_jax'] / peaks['PyTorch']:.2f} times PyTorch's"
    )


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


if __name__ == "__main__":
    main()
