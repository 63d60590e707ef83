"""Generation next to PyTorch's transformers on the same cores, and what an int8 cache costs: `bench_generation.py OUT`.

Both run float32 with a key-value cache from the same compressed folder, ours materialised once, theirs loaded from a
dense export; rounds alternate. The perplexity is of 8,192 tokens of the shipped text, each window of 512 passed
through the cache in one piece, so that every key and value is read from it. Needs `pip install ".[parity]"`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax import data
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.core.losses import token_nll
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.reporting.tables import format_table
from cluscomp_jax.text.text import load_tokens

TOKENS, CONTEXT = 8192, 512
PROMPT, NEW, LONG = 16, 64, 512


def ours(decoder: Decoder, prompt: np.ndarray, new: int) -> None:
    for column in decoder.stream([prompt], new, Sampling(), jax.random.key(0)):
        np.asarray(column)


def theirs(model: Any, prompt: np.ndarray, new: int) -> None:
    import torch

    tokens = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True)


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare_speed(opened: OpenedModel, decoder: Decoder, tokens: np.ndarray, rounds: int) -> None:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        export_checkpoint(open_checkpoint(opened.files[0].parent), Path(scratch, "dense"), "dense")
        model = transformers.AutoModelForCausalLM.from_pretrained(str(Path(scratch, "dense")), dtype=torch.float32)
    short, long = tokens[:PROMPT], tokens[:LONG]
    runs = {
        ("decode", "ours"): lambda: ours(decoder, short, NEW + 1),
        ("decode", "theirs"): lambda: theirs(model, short, NEW + 1),
        ("first", "ours"): lambda: ours(decoder, short, 1),
        ("first", "theirs"): lambda: theirs(model, short, 1),
        ("prefill", "ours"): lambda: ours(decoder, long, 1),
        ("prefill", "theirs"): lambda: theirs(model, long, 1),
    }
    for run in runs.values():
        run()
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    rows = []
    for label, count, whole, less in (
        (f"decode, {NEW} tokens", NEW, "decode", "first"),
        (f"prefill, {LONG} tokens", LONG, "prefill", None),
    ):
        rates = {
            side: [count / (seconds[whole, side][i] - (seconds[less, side][i] if less else 0.0)) for i in range(rounds)]
            for side in ("ours", "theirs")
        }
        ratios = sorted(a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True))
        median = {side: statistics.median(values) for side, values in rates.items()}
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        middle = f"{statistics.median(ratios):.2f}"
        rows.append((label, f"{median['ours']:.1f}", f"{median['theirs']:.1f}", middle, spread))
    header = (f"tokens/s, median of {rounds}, {torch.get_num_threads()} threads", "ours", "PyTorch", "ratio", "range")
    print(format_table(header, rows))


def cached_perplexity(decoder: Decoder, windows: np.ndarray) -> tuple[float, int]:
    """Returns (perplexity of windows [w, t], bytes of the cache of one window)."""
    total, size = 0.0, 0
    for window in windows:
        caches = decoder.empty_caches(1, windows.shape[1])
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
        x = decoder.through_blocks(jnp.asarray(window[None]), caches, None, windows.shape[1])
        logits = jax.jit(decoder.model.head)(decoder.outer, x[:, :-1])
        total += float(jnp.sum(token_nll(logits, jnp.asarray(window[None, 1:]))))
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))), size


def compare_caches(opened: OpenedModel, tokens: np.ndarray) -> None:
    rows = []
    for cache in ("float32", "bfloat16", "int8"):
        decoder = Decoder.load(opened.source, opened.model, dtype="float32", decode_weights="once", cache_dtype=cache)
        found, size = cached_perplexity(decoder, tokens.reshape(-1, CONTEXT))
        rows.append((cache, f"{found:.4f}", f"{size:,}"))
    print(format_table(("cache", f"perplexity, {TOKENS} tokens", f"bytes for {CONTEXT} positions"), rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="compressed folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--speed-only", action="store_true", help="leave out the perplexities of the caches")
    options = parser.parse_args()
    opened = open_model(options.model)
    tokens = load_tokens(data.path("wiki_test"), opened.load_tokenizer())[:TOKENS]
    if not options.speed_only:
        compare_caches(opened, tokens)
    decoder = Decoder.load(opened.source, opened.model, dtype="float32", decode_weights="once")
    compare_speed(opened, decoder, tokens, options.rounds)


if __name__ == "__main__":
    main()
