"""Perplexity of SmolLM2-135M under every setting of the quality tables, for several seeds; what is done is not redone.

    cluscomp demo --fetch
    python scripts/bench_quality.py --out quality                            # the table of bit budgets, three seeds
    python scripts/bench_quality.py --out quality --table recipes --seeds 1  # the default recipe and the best one
    python scripts/bench_quality.py --out quality --table parts --seeds 1    # what each part of the method buys
    python scripts/bench_quality.py --out quality --table hessian            # shrinkage and damping
    python scripts/bench_quality.py --out quality --table outputs            # outputs weighted or not, by seed
    python scripts/bench_quality.py --out quality --table generated          # recovery with and without written samples
    python scripts/bench_quality.py --out quality --table calibration        # which text, and how much of it

Calibration is the fixed set of cluscomp_jax/data, perplexity that of the first 8,192 tokens of wiki_test in windows of
512. A run takes 5 to 40 minutes on two cores; every finished one leaves NAME-SEED.json and its checkpoint in OUT.
The baselines to compare with, round-to-nearest and scalar GPTQ, are in scripts/bench_quality_baselines.py.
"""

import argparse
import bisect
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax import data
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.io.open import open_model
from cluscomp_jax.text.text import calibration_samples, load_tokens, read_starts

TEXT, TEST, STARTS = data.path("wiki_train"), data.path("wiki_test"), data.path("calibration_starts")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FOUR_BITS, DISTILL = CONFIGS / "smollm2_135m_4bit.toml", CONFIGS / "finetune/distill.toml"
UNTUNED = "tuning = false"
EVEN = "group_size = 4\nnum_codes = 1024"
TRELLIS = "group_size = 2, num_codes = 1024, step_bits = 4"

DISTILLED = "-distilled"
"""Ends the name of a row that goes on from the row before the ending: one more pass over its samples, with the
original (configs/finetune/distill.toml)."""

Row = tuple[str, int, int]
"""(TOML, samples, tokens per sample)."""


def budget(bits: float, *, mixed_precision: str = "none", tuned: bool = True) -> str:
    settings = f'bits = {bits}\ncoding = "plain"\nmixed_precision = "{mixed_precision}"'
    return f"{'' if tuned else UNTUNED}\n[cluster]\n{settings}"


def even(cluster: str = "", *, top: str = UNTUNED) -> str:
    """Returns the TOML of one (g, n) = (4, 1024) for all matrices: 2.63 bits per weight."""
    return f"{top}\n[cluster]\n{cluster}\n[[cluster.rules]]\n{EVEN}"


TABLES: dict[str, dict[str, Row]] = {
    "budgets": {
        "2.63-clustered-16": (budget(2.63, tuned=False), 16, 512),
        "2.63-tuned-16": (budget(2.63), 16, 512),
        "2.63-tuned-64": (budget(2.63), 64, 512),
        "2.63-bfloat16-64": (f'{budget(2.63)}\n[tuning]\ncompute_dtype = "bfloat16"', 64, 512),  # as on a GPU
        "2.1-tuned-64": (budget(2.1), 64, 512),
        "2.63-mixed-16": (budget(2.63, mixed_precision="per_matrix", tuned=False), 16, 512),
        "3.3-clustered-64": (
            budget(3.3, mixed_precision="per_matrix", tuned=False),
            64,
            512,
        ),  # one (g, n) reaches only 3.05
        "3.3-tuned-64": (budget(3.3, mixed_precision="per_matrix"), 64, 512),
        "4.02-tuned-64": (budget(4.1), 64, 512),  # a codebook for every kernel; g=3 would be 4.39
        "4.1-tuned-64": (FOUR_BITS.read_text(), 64, 512),
    },
    "parts": {
        "blind": (even("weighted = false\nerror_feedback = false", top=f'recipe = "paper"\n{UNTUNED}'), 16, 512),
        "weighted": (even("error_feedback = false"), 16, 512),
        "error-feedback": (even("drift_correction = false\ntrue_sequential = false\nrefine_rounds = 0"), 16, 512),
        "true-sequential": (even("drift_correction = false\nrefine_rounds = 0"), 16, 512),
        "drift-correction": (even("refine_rounds = 0"), 16, 512),
        "refine_rounds": (even(), 16, 512),
        "mixed-matrix": (budget(2.63, mixed_precision="per_matrix", tuned=False), 16, 512),
        "refine_rounds-64": (even(), 64, 512),
        "tuned-64": (even(top=""), 64, 512),
        "paper-tuned": (even("weighted = false\nerror_feedback = false", top='recipe = "paper"'), 16, 512),
    },
    "calibration": {
        f"{samples}x{length}": (even(), samples, length) for length in (256, 512) for samples in (8, 16, 64, 128)
    }
    | {"code-64x512": (even(), 64, 512)},
}
TABLES["recipes"] = {
    f"{bits}-{recipe}-64": (f'recipe = "{recipe}"\n[cluster]\nbits = {bits}', 64, 512)
    for bits in (1.08, 2.08, 2.65, 3.1, 4.06)
    for recipe in ("default", "best")
}
TABLES["outputs"] = {
    f"{bits}-outputs-{weighted}": (f"{UNTUNED}\n[cluster]\nbits = {bits}\nweighted_outputs = {weighted}", 16, 512)
    for bits in (2.08, 1.08)
    for weighted in ("true", "false")
}
TABLES["generated"] = {
    f"2.08-generated-{count}": (
        f'recipe = "best"\n[cluster]\nbits = 2.08\n[recovery]\ngenerated_samples = {count}',
        64,
        512,
    )
    for count in (0, 64)
}
TABLES["hessian"] = {
    f"{name}-shrinkage-{shrinkage}-damping-{damping}": (
        f"{UNTUNED}\n[cluster]\nshrinkage = {shrinkage}\ndamping = {damping}\nrules = [{{{rule}}}]",
        16,
        512,
    )
    for name, rule in (("trellis", TRELLIS), ("plain", "group_size = 4, num_codes = 256"))
    for shrinkage, damping in ((0.0, 0.01), (0.0, 0.03), (0.1, 0.01), (0.2, 0.01), (0.35, 0.01), (0.5, 0.01))
}
TABLES["budgets"] |= {
    f"{name}{DISTILLED}": TABLES["budgets"][name]
    for name in ("2.63-tuned-64", "2.1-tuned-64", "3.3-tuned-64", "4.1-tuned-64")
}


def measure(name: str, setting: Row, seed: int, out: Path) -> dict[str, Any]:
    """Returns {"perplexity", "bits_per_weight", "seconds"} of one run, from its file if it is there already."""
    done, folder = out / f"{name}-{seed}.json", out / f"{name}-{seed}"
    if not done.exists():
        distilled = name.endswith(DISTILLED)
        base = measure(name.removesuffix(DISTILLED), setting, seed, out)["seconds"] if distilled else 0.0
        if not (folder / "manifest.json").exists():  # else killed before its result was written
            (_follow if distilled else _compress)(name, setting, seed, out)
        manifest = open_checkpoint(folder).manifest
        spent: Any = (manifest.metrics["finetune"] if distilled else manifest.metrics)["seconds"]
        score = _cluscomp("evaluate", str(folder), "--text", str(TEST), "--tokens", "8192", "--context", "512")
        bits = manifest.contents.totals["bits_per_weight"]
        result = {"perplexity": score["perplexity"], "bits_per_weight": bits, "seconds": base + spent}
        done.with_suffix(".part").write_text(json.dumps(result))
        done.with_suffix(".part").replace(done)
    known: dict[str, Any] = json.loads(done.read_text())
    return known


def _compress(name: str, setting: Row, seed: int, out: Path) -> None:
    config, samples, length = setting
    toml = out / f"{name}-{seed}.toml"
    toml.write_text(config + "\n")
    options = ["--config", str(toml), "--seed", str(seed)]
    if 'recipe = "paper"' not in config or UNTUNED not in config:  # blind clustering reads no text
        options += ["--samples", str(samples), "--length", str(length)]
        code = name.startswith("code")
        options += ["--calibration", str(_code(out) if code else TEXT)]
        options += [] if code else ["--sample-offsets", str(_starts(out, samples))]
    _cluscomp("compress", str(find_model()), *options, "--out", str(out / f"{name}-{seed}"))


def _follow(name: str, setting: Row, seed: int, out: Path) -> None:
    """One pass with the original as teacher over the samples that the model was compressed with, no others."""
    _, samples, length = setting
    rows = out / f"samples-{samples}x{length}.npy"
    if not rows.exists():
        tokens = load_tokens(TEXT, open_model(find_model()).load_tokenizer())
        starts = read_starts(_starts(out, samples))
        crops = calibration_samples(tokens, samples=samples, length=length, seed=seed, sample_offsets=starts)
        np.save(rows.with_suffix(".part.npy"), crops.ravel())
        rows.with_suffix(".part.npy").replace(rows)
    options = ["--config", str(DISTILL), "--teacher", str(find_model()), "--data", str(rows), "--steps", str(samples)]
    options += ["--length", str(length), "--seed", str(seed), "--out", str(out / f"{name}-{seed}")]
    _cluscomp("finetune", str(out / f"{name.removesuffix(DISTILLED)}-{seed}"), *options)


def _cluscomp(*arguments: str) -> dict[str, Any]:
    """Runs one command, progress to our standard error; returns its last line."""
    command = [sys.executable, "-m", "cluscomp_jax", *arguments, "--json"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    fields: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return fields


def _starts(out: Path, samples: int) -> Path:
    """Returns the fixed starts, and for more samples than it has, the middle of the widest gap, again and again."""
    fixed = [int(line) for line in STARTS.read_text().split()]
    if samples <= len(fixed):
        return STARTS
    more = out / f"starts-{samples}.txt"
    starts = sorted(fixed)
    while len(starts) < samples:
        gap, left = max((b - a, a) for a, b in itertools.pairwise(starts))
        bisect.insort(starts, left + gap // 2)
    more.write_text("".join(f"{start}\n" for start in starts))
    return more


def _code(out: Path) -> Path:
    """Returns a text that is no Wikipedia: the sources of the Python standard library."""
    path = out / "code.txt"
    library = Path(json.__file__).parent.parent
    path.write_text(
        "\n\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in sorted(library.glob("[a-m]*.py")))
    )
    return path


def rows(table: dict[str, Row], seeds: list[int], out: Path) -> Iterator[str]:
    """Yields the lines of a Markdown table, each as soon as its runs are done."""
    yield f"| setting | bits per weight | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | minutes |"
    yield "|---" * (len(seeds) + 4) + "|"
    for name, setting in table.items():
        results = [measure(name, setting, seed, out) for seed in seeds]
        scores = [result["perplexity"] for result in results]
        minutes = statistics.mean(result["seconds"] for result in results) / 60
        cells = [name, f"{results[0]['bits_per_weight']:.3f}", *(f"{score:.2f}" for score in scores)]
        yield f"| {' | '.join(cells)} | {statistics.mean(scores):.2f} | {minutes:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results, made if absent")
    parser.add_argument("--table", choices=sorted(TABLES), default="budgets")
    parser.add_argument("--settings", nargs="+", help="only these rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    table = TABLES[options.table]
    unknown = sorted(set(options.settings or ()) - set(table))
    if unknown:
        parser.error(f"no row {unknown[0]!r} in table {options.table!r}; rows: {', '.join(table)}")
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: table[name] for name in options.settings or table}
    for line in rows(chosen, options.seeds, options.out):
        print(line, flush=True)


if __name__ == "__main__":
    main()
