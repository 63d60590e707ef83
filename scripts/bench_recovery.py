"""Recovery training of SmolLM2-135M after compression, and for comparison, the original finetuned on the same tokens.

    cluscomp demo --fetch
    python scripts/bench_recovery.py --out recovery                                  # 2.1 bits, tuned: 64 x 512 tokens
    python scripts/bench_recovery.py --out recovery --bits 1.1 --untuned --steps 100
    python scripts/bench_recovery.py --out recovery --compressed FOLDER              # one that is there already

Training is on wiki_train by configs/finetune/recovery.toml; perplexity is that of the first 8,192 tokens of wiki_test
in windows of 512. What is done is not redone: given again, the script resumes. Prints a Markdown table; minutes are
those of the steps alone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax import data
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.io.open import open_model
from cluscomp_jax.text.text import load_tokens

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "finetune" / "recovery.toml"
LENGTH, TEST_TOKENS = 512, 8192
DENSE = (r"model/layers/\d+/.*/kernel", ".*norm/weight")


def cluscomp(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cluscomp_jax", *arguments], check=True)


def compress(folder: Path, options: argparse.Namespace) -> None:
    """Compresses the model by the default recipe; without tuning from a quarter of the samples."""
    if (folder / "manifest.json").exists():
        return
    samples = "16" if options.untuned else "64"
    cluscomp(
        "compress", str(find_model()), "--out", str(folder), "--bits", str(options.bits), "--seed", "1",
        "--calibration", str(data.path("wiki_train")), "--sample-offsets", str(data.path("calibration_starts")),
        "--samples", samples, "--length", str(LENGTH), *(["--no-tuning"] if options.untuned else []),
    )  # fmt: skip


def finetune(model: Path, out: Path, options: argparse.Namespace, *, rate: float, trainable: tuple[str, ...]) -> None:
    if (out / "manifest.json").exists():
        return
    held_out = options.out / "test.npy"
    if not held_out.exists():
        np.save(held_out, load_tokens(data.path("wiki_test"), open_model(find_model()).load_tokenizer())[:TEST_TOKENS])
    cluscomp(
        "finetune", str(model), "--config", str(RECIPE), "--data", str(data.path("wiki_train")), "--out", str(out),
        "--evaluation", str(held_out), "--steps", str(options.steps), "--evaluate-every", str(options.every),
        "--save-every", str(options.every), "--length", str(LENGTH), "--learning-rate", str(rate),
        *(["--trainable", *trainable] if trainable else []),
    )  # fmt: skip


def curve(out: Path) -> dict[int, tuple[float, float]]:
    """Returns {steps: (minutes of training until then, perplexity)}."""
    found, seconds = {}, 0.0
    for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if record["event"] == "step":
            seconds += record["seconds"]
        elif record["event"] == "evaluation":
            found[record["step"]] = (seconds / 60, record["perplexity"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results, made if absent")
    parser.add_argument("--bits", type=float, default=2.1)
    parser.add_argument("--untuned", action="store_true", help="clustered from 16 x 512 tokens only")
    parser.add_argument("--compressed", type=Path, help="a compressed folder to begin with")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--original-rate", type=float, default=1e-4, help="of the original's kernels; 0 leaves it out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    compressed = options.compressed or options.out / f"compressed-{options.bits}"
    compress(compressed, options)
    runs: dict[str, tuple[Path, dict[str, Any]]] = {
        f"recovered-{compressed.name}": (compressed, {"rate": options.rate, "trainable": ()})
    }
    if options.original_rate:
        runs["original"] = (find_model(), {"rate": options.original_rate, "trainable": DENSE})
    curves = {}
    for name, (model, how) in runs.items():
        finetune(model, options.out / name, options, **how)
        curves[name] = curve(options.out / name)
    print("| steps | tokens | " + " | ".join(f"{name}, perplexity (minutes)" for name in curves) + " |")
    print("|---" * (len(curves) + 2) + "|")
    for step in sorted(set().union(*curves.values())):
        cells = [f"{found[step][1]:.2f} ({found[step][0]:.1f})" if step in found else "" for found in curves.values()]
        print(f"| {step} | {step * LENGTH:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
