"""What exports cost and whether others measure the same: `bench_export.py perplexity OUT`, `bench_export.py memory`.

`perplexity` exports a compressed folder as AQLM and dense, loads both with transformers in PyTorch float32, and sets
their perplexity next to ours. `memory` makes a checkpoint of two blocks in the shape of Llama-2-70B with random codes
and exports it in every format, each in a process of its own. Needs `pip install ".[parity]"` for the first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np

from cluscomp_jax import data
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.checkpoint.writer import CheckpointWriter
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import index_shape
from cluscomp_jax.core.trees import unflatten
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.export import ExportFormat, export_checkpoint
from cluscomp_jax.io.open import open_model
from cluscomp_jax.models.llama import parse_config
from cluscomp_jax.models.model import build_model
from cluscomp_jax.reporting.tables import format_bytes, format_table
from cluscomp_jax.text.text import load_tokens

TOKENS, CONTEXT = 8192, 512
LLAMA_2_70B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
G, CODES = 4, 65500


def torch_perplexity(folder: Path, windows: np.ndarray) -> float:
    """Returns the perplexity of windows [w, t] under what transformers loads from a folder, float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    total = 0.0
    with torch.no_grad():
        for window in windows:
            tokens = torch.from_numpy(window.astype(np.int64))
            logits = model(tokens[None]).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1))))


def compare_perplexity(model: str) -> None:
    opened = open_model(model)
    tokens = load_tokens(data.path("wiki_test"), opened.load_tokenizer())[:TOKENS]
    rows = [("cluscomp_jax", f"{perplexity(opened.source, tokens, opened.model, context=CONTEXT).perplexity:.4f}")]
    with tempfile.TemporaryDirectory() as scratch:
        for form in ("dense", "aqlm"):
            export_checkpoint(open_checkpoint(model), Path(scratch, form), form)  # type: ignore[arg-type]
            found = torch_perplexity(Path(scratch, form), tokens.reshape(-1, CONTEXT))
            rows.append((f"{form}, transformers", f"{found:.4f}"))
    print(format_table((f"{model}, {TOKENS} tokens", "perplexity"), rows))


def random_checkpoint(path: Path, blocks: int) -> None:
    """Writes a checkpoint in the shape of Llama-2-70B whose codes are random."""
    config = parse_config({**LLAMA_2_70B, "num_hidden_layers": blocks})
    model, rng = build_model(config), np.random.default_rng(0)

    def leaf(name: str, shape: tuple[int, ...]) -> Any:
        if not name.endswith("_proj/kernel"):
            return np.full(shape, 0.5, ml_dtypes.bfloat16)
        index = rng.integers(0, CODES, index_shape((shape[0], shape[1]), G, "out"), np.uint16)
        codes = (0.02 * rng.standard_normal((CODES, G))).astype(np.float16)
        return CodebookArray(codes, index, (shape[0], shape[1]))

    with CheckpointWriter(path, model_config=config, run_config={"random": True}, fingerprint="random") as writer:
        for i in range(blocks):
            writer.store_block(i, unflatten({n: leaf(n, shape) for n, shape in model.block_shapes(i).items()}))
        writer.store_outer(unflatten({n: leaf(n, shape) for n, shape in model.outer_shapes().items()}))
        writer.finish(provenance={}, metrics={})


def measure_memory(forms: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        random_checkpoint(Path(scratch, "model"), 2)
        for form in forms:
            out = Path(scratch, "out", form)
            out.parent.mkdir(exist_ok=True)
            argv = ["export", str(Path(scratch, "model")), "--format", form, "--out", str(out), "--json"]
            done = subprocess.run(
                [sys.executable, "-m", "cluscomp_jax", *argv], check=True, capture_output=True, text=True
            )
            fields = json.loads(done.stdout.splitlines()[-1])
            rows.append(
                (
                    form,
                    format_bytes(fields["bytes"]),
                    f"{fields['seconds']:.1f}",
                    format_bytes(fields["peak_rss_bytes"]),
                )
            )
            subprocess.run(["rm", "-r", str(out)], check=True)
    print(format_table(("two blocks of Llama-2-70B", "size", "seconds", "peak memory"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("perplexity").add_argument("model", help="compressed folder")
    memory = commands.add_parser("memory")
    memory.add_argument("--formats", nargs="+", default=get_args(ExportFormat), choices=get_args(ExportFormat))
    options = parser.parse_args()
    if options.command == "perplexity":
        compare_perplexity(options.model)
    else:
        measure_memory(list(options.formats))


if __name__ == "__main__":
    main()
