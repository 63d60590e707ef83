"""Perplexity of a model quantised round-to-nearest and by scalar GPTQ, in PyTorch: the baselines of ClusComp.

The model, calibration tokens and measure are those of our own figures: calibration is wiki_train cut at the fixed
starts, the score is the perplexity of wiki_test. Every kernel of every decoder block is quantised, nothing else. Bits
count what would be stored: the codes, and a 16-bit scale and a zero point of `bits` bits for every group of consecutive
input channels of every output. Kernels are [i, o], input channels i and outputs o. Appends one JSON line per result
to --out; asserts nothing.

GPTQ is Frantar et al., 2022 (arXiv 2210.17323), written from the paper: channels in order, 1% damping, and the grid of
a group taken when the group begins from the weights as corrected by then. The Hessians of a block's inputs are taken
through quantised predecessors and the block's own dense weights.

    pip install ".[cli,parity]"
    python scripts/bench_quality_baselines.py --method rtn gptq --setting 2:32 3:64 4:128 --out results.jsonl
"""

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cluscomp_jax import data
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.cli.inputs import read_tokens
from cluscomp_jax.clustering.hessian import collect_hessians
from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.perplexity import Perplexity, perplexity
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.models.model import Model, check_tokens, run_block, run_embed
from cluscomp_jax.models.source import DictSink
from cluscomp_jax.models.streams import Batch
from cluscomp_jax.reporting.tables import format_table
from cluscomp_jax.runtime.reporter import to_json
from cluscomp_jax.text.text import calibration_samples

METHODS = ("rtn", "gptq")
DAMPING = 0.01
"""Share of the mean diagonal of the Hessian that is added to it."""
LAZY = 128
"""Channels whose errors reach the channels after them together."""
SCALE_BITS, SMALLEST, LARGEST = 16, 2.0**-24, 65504.0  # of a float16


class Quantizer(NamedTuple):
    """Bits per code, and consecutive input channels of one output that share a grid (the last group may be shorter)."""

    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.bits}:{self.group}"


def parse_setting(text: str) -> Quantizer:
    """Returns the setting that "BITS:GROUP" spells.

    Raises:
      InputError: it spells none, or bits outside 1 to 8, or a group below 1.
    """
    bits, _, group = text.partition(":")
    if not (bits.isdecimal() and group.isdecimal()):
        raise InputError(f"--setting {text!r} is not BITS:GROUP; write 3:64 for instance")
    if not 1 <= int(bits) <= 8 or int(group) < 1:
        raise InputError(f"--setting {text}: bits are 1 to 8 and a group has 1 channel or more")
    return Quantizer(int(bits), int(group))


def stored_bits(shape: tuple[int, ...], setting: Quantizer) -> int:
    """Returns the bits of one kernel [i, o]: its codes, and scale and zero point of every group."""
    channels, outputs = shape
    groups = -(-channels // setting.group)
    return outputs * (channels * setting.bits + groups * (SCALE_BITS + setting.bits))


class Grid(NamedTuple):
    """The asymmetric grid of one group: scale [o], as float16 stores it, and zero point [o] in 0 … levels-1."""

    scale: torch.Tensor
    zero: torch.Tensor
    last: int

    def nearest(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns the dequantised nearest points of weights [..., o]."""
        codes = torch.clamp(torch.round(weights / self.scale) + self.zero, 0, self.last)
        return self.scale * (codes - self.zero)


def find_grid(weights: torch.Tensor, bits: int) -> Grid:
    """Returns the grid from minimum to maximum, zero included, of the group's weights [channels, o]."""
    last = 2**bits - 1
    low, high = weights.amin(0).clamp(max=0), weights.amax(0).clamp(min=0)
    scale = ((high - low) / last).clamp(SMALLEST, LARGEST).half().to(weights.dtype)
    return Grid(scale, torch.clamp(torch.round(-low / scale), 0, last), last)


def rtn(kernel: torch.Tensor, setting: Quantizer) -> torch.Tensor:
    """Returns the kernel [i, o], every weight moved to the nearest point of its group's grid."""
    return torch.cat([find_grid(group, setting.bits).nearest(group) for group in torch.split(kernel, setting.group)])


def gptq(kernel: torch.Tensor, hessian: torch.Tensor, setting: Quantizer, *, act_order: bool = False) -> torch.Tensor:
    """Returns the dequantised kernel [i, o], each channel's error compensated by the channels after it.

    Args:
      kernel: computed in its own dtype.
      hessian: E[x x^T] [i, i] of the kernel's inputs.
      act_order: channels of large moment first, on grids found before anything has moved.

    With H the damped Hessian and H^-1 = U^T U, U upper triangular, fixing channel i to q moves each channel k after it
    by -U[i, k] / U[i, i] * (w_i - q).
    """
    channels = len(kernel)
    order = torch.arange(channels)
    if act_order:
        order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order]).to(kernel.dtype)
    static = [find_grid(group, setting.bits) for group in torch.split(kernel, setting.group)] if act_order else []
    weights = kernel[order]
    for begin, end in lazy_batches(channels, setting.group):
        errors = torch.empty_like(weights[begin:end])
        for i in range(begin, end):
            if act_order:
                grid = static[int(order[i]) // setting.group]
            elif i % setting.group == 0:
                grid = find_grid(weights[i : i + setting.group], setting.bits)
            rounded = grid.nearest(weights[i])
            error = (weights[i] - rounded) / factor[i, i]
            weights[i + 1 : end] -= torch.outer(factor[i, i + 1 : end], error)
            weights[i] = rounded
            errors[i - begin] = error
        weights[end:] -= factor[begin:end, end:].T @ errors
    result = torch.empty_like(weights)
    result[order] = weights
    return result


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Returns U float64 [i, i], upper triangular, with U^T U the inverse of the damped Hessian."""
    hessian = hessian.double()
    mean = float(torch.diagonal(hessian).mean())
    damped = hessian + DAMPING * (mean if mean > 0 else 1.0) * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def lazy_batches(channels: int, group: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of at most LAZY channels.

    No group that begins inside a batch reaches beyond it: its grid is found from weights that all errors have reached.
    """
    stride = LAZY // group * group or group
    for start in range(0, channels, stride):
        stop = min(start + stride, channels)
        for begin in range(start, stop, LAZY):
            yield begin, min(begin + LAZY, stop)


def as_tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


class Quantised(NamedTuple):
    """The params with dequantised float32 kernels, the stored bits per weight of these, and the seconds it took."""

    params: Params
    bits_per_weight: float
    seconds: float


def quantise(
    opened: OpenedModel, method: str, setting: Quantizer, calibration: np.ndarray, *, act_order: bool
) -> Quantised:
    """Quantises block after block; with GPTQ each sees the calibration tokens through the quantised ones before it."""
    began = time.monotonic()
    model, sink = opened.model, DictSink()
    sink.store_outer(opened.source.load_outer())
    stream = embed(model, opened.source.load_outer(), calibration) if method == "gptq" else []
    bits = weights = 0
    for i in range(model.num_blocks):
        block, layer_type = opened.source.load_block(i), model.layer_type(i)
        flat = trees.flatten(block)
        hessians: dict[str, jax.Array] = {}
        if stream:
            on_device = jax.tree.map(jnp.asarray, block)
            for group in model.input_groups:
                hessians[group] = collect_hessians(
                    model, layer_type, [group], on_device, (Batch(jnp.asarray(x)) for x in stream)
                )[group].hessian
        for path, group in ((path, group) for group, paths in model.input_groups.items() for path in paths):
            kernel = as_tensor(flat[path])
            hessian = as_tensor(hessians[group]) if stream else None
            done = rtn(kernel, setting) if hessian is None else gptq(kernel, hessian, setting, act_order=act_order)
            flat[path] = done.numpy()
            bits += stored_bits(kernel.shape, setting)
            weights += kernel.numel()
        sink.store_block(i, trees.unflatten(flat))
        if i + 1 < model.num_blocks:
            on_device = jax.tree.map(jnp.asarray, sink.load_block(i))
            stream = [
                np.asarray(run_block(on_device, jnp.asarray(x), model=model, layer_type=layer_type)) for x in stream
            ]
        seconds = time.monotonic() - began
        print(f"{method} {setting}: block {i + 1}/{model.num_blocks}, {seconds:.1f} s", file=sys.stderr, flush=True)
    return Quantised(sink.params(model), bits / weights, time.monotonic() - began)


def embed(model: Model, outer: Params, tokens: np.ndarray) -> list[np.ndarray]:
    """Returns the embedded samples, float32 [1, length, d] each."""
    run = partial(run_embed, jax.tree.map(jnp.asarray, outer), model=model, dtype=jnp.dtype("float32"))
    return [np.asarray(run(jnp.asarray(sample[None]))) for sample in tokens]


class Inputs(NamedTuple):
    """Everything that was read: calibration int32 [samples, length], and the text int32 [tokens]."""

    opened: OpenedModel
    settings: list[Quantizer]
    calibration: np.ndarray
    text: np.ndarray


def read_inputs(options: argparse.Namespace) -> Inputs:
    """Returns the inputs. Raises InputError for whatever does not fit, before any long work."""
    settings = [parse_setting(text) for text in options.setting]
    if not 2 <= options.context <= options.tokens:
        raise InputError(f"--context {options.context} is 2 or more and at most --tokens {options.tokens}")
    opened = open_model(options.model or find_model())
    if opened.layer_type == "compressed":
        raise InputError(f"{options.model} is already compressed; give the original model")
    stream = read_tokens(opened, str(data.path("wiki_train")), split="train")
    sampled = {"samples": options.samples, "length": options.length, "seed": 0}
    calibration = calibration_samples(stream, sample_offsets=np.asarray(data.calibration_starts()), **sampled)
    check_tokens(calibration, opened.model, "calibration")
    text = read_tokens(opened, str(data.path("wiki_test")), first=options.tokens)
    try:
        options.out.open("a").close()
    except OSError as error:
        raise InputError(f"--out {options.out} cannot be written: {error.strerror}; name another file") from None
    return Inputs(opened, settings, calibration, text)


def record(
    options: argparse.Namespace, name: str, method: str, setting: Quantizer, quantised: Quantised, score: Perplexity
) -> dict[str, Any]:
    """Returns the JSON fields of one result."""
    return {
        "model": name,
        "method": method,
        **setting._asdict(),
        "act_order": options.act_order and method == "gptq",
        "bits_per_weight": quantised.bits_per_weight,
        **{field: getattr(score, field) for field in ("perplexity", "tokens", "context")},
        "calibration": [options.samples, options.length] if method == "gptq" else None,
        "seconds": quantised.seconds,
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
    }


def bench(options: argparse.Namespace) -> str:
    """Measures every method at every setting and returns the table."""
    inputs = read_inputs(options)
    rows = []
    for method in options.method:
        for setting in inputs.settings:
            done = quantise(inputs.opened, method, setting, inputs.calibration, act_order=options.act_order)
            score = perplexity(done.params, inputs.text, inputs.opened.model, context=options.context)
            fields = record(options, inputs.opened.name, method, setting, done, score)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(to_json(fields) + "\n")
            name = f"{method}, act order" if fields["act_order"] else method
            figures = f"{done.bits_per_weight:.3f}", f"{score.perplexity:.2f}", f"{done.seconds:.1f}"
            rows.append((name, setting, *figures))
    return format_table(("method", "bits:group", "bits per weight", "perplexity", "seconds"), rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="GGUF file, Hugging Face folder or hub id; the demo's by default")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--setting", nargs="+", default=["2:32", "3:64", "4:128"], metavar="BITS:GROUP")
    parser.add_argument("--act-order", action="store_true", help="GPTQ: large channels first, on static groups")
    parser.add_argument("--samples", type=int, default=16, help="of calibration; at most 64")
    parser.add_argument("--length", type=int, default=512, help="tokens per sample")
    parser.add_argument("--tokens", type=int, default=8192, help="first tokens of wiki_test to score")
    parser.add_argument("--context", type=int, default=512, help="tokens per window of the score")
    parser.add_argument("--out", type=Path, required=True, help="file to which one JSON line per result is appended")
    try:
        print(bench(parser.parse_args(arguments)))
    except InputError as error:
        print(f"bench_quality_baselines: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
