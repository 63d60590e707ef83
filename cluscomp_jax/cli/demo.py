"""`cluscomp demo`: compresses a Llama to about 3 bits per weight, measures, saves, loads and continues a question.

Writes into OUT: clustered/ and tuned/ (checkpoints), report/ (the HTML report of tuned/), report.txt and, last,
report.json.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax import data
from cluscomp_jax.checkpoint.reader import describe, open_checkpoint
from cluscomp_jax.checkpoint.run_folder import AlreadyFinished
from cluscomp_jax.cli.arguments import DemoArguments
from cluscomp_jax.cli.demo_model import fetch_model, find_model
from cluscomp_jax.cli.demo_report import Demo, demo_table
from cluscomp_jax.cli.folder import compress_to_folder
from cluscomp_jax.cli.generate import encode_prompt
from cluscomp_jax.cli.outcome import Result, note
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import PAPER, CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.evaluation.perplexity import Perplexity, perplexity
from cluscomp_jax.inference.decoder import generate
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.io.tokenizer import stop_tokens
from cluscomp_jax.models.source import ParamSource
from cluscomp_jax.reporting.html.page import write_report
from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.reporter import Reporter, console_reporter, to_json
from cluscomp_jax.runtime.timing import StageTimer, process_peak_rss_bytes
from cluscomp_jax.text.text import calibration_samples, load_tokens

SETTINGS = CompressConfig(
    cluster=ClusterConfig(rules=(CompressionRule(group_size=3, num_codes=512),)),
    calibration=CalibrationConfig(samples=32, length=512),
    tuning=BlockTuningConfig(),
)
"""What the demo runs: 3.05 bits per weight, and the first 32 x 512 tokens of the project's fixed calibration set."""

EVALUATED_TOKENS, CONTEXT = 8192, 512
QUESTION = "What is gravity?"
NEW_TOKENS = 32
REPORT_NAME = "report.json"
_OWN = {"clustered", "tuned", "report", "report.txt", "report.txt.tmp", "report.json.tmp"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a demo works on: the original, the run, calibration tokens [samples, length], and a text [t] to score."""

    opened: OpenedModel
    cfg: CompressConfig
    calibration: np.ndarray
    calibration_name: str
    text: np.ndarray
    context: int


def run(arguments: DemoArguments) -> Result:
    """Returns the demo's table, sentences and numbers."""
    opened = open_model(fetch_model() if arguments.fetch else find_model())
    out = _free_folder() if arguments.out is None else Path(arguments.out)
    refuse_occupied(out)
    tokenizer = opened.load_tokenizer()
    tokens = load_tokens(data.path("wiki_train"), tokenizer)
    cfg = dataclasses.replace(SETTINGS, model=opened.config)
    samples, length = cfg.calibration.samples, cfg.calibration.length
    sample_offsets = np.asarray(data.calibration_starts())
    calibration = calibration_samples(
        tokens, samples=samples, length=length, seed=cfg.seed, sample_offsets=sample_offsets
    )
    text = load_tokens(data.path("wiki_test"), tokenizer)[:EVALUATED_TOKENS]
    return run_demo(Inputs(opened, cfg, calibration, "wiki_train", text, CONTEXT), out)


def _free_folder() -> Path:
    """Returns the first of cluscomp-demo, cluscomp-demo-2, … that a demo can start or resume in."""
    for number in itertools.count(1):
        out = Path("cluscomp-demo" if number == 1 else f"cluscomp-demo-{number}")
        try:
            refuse_occupied(out)
        except InputError:
            continue
        return out
    raise AssertionError("itertools.count ends nowhere")


def refuse_occupied(out: Path) -> None:
    """Raises InputError unless `out` is absent, an empty folder, or the folder of an unfinished demo."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is not a folder; choose another name for --out")
    if (out / REPORT_NAME).exists():
        raise InputError(f"{out} holds a finished demo; read its {REPORT_NAME}, or choose another --out")
    strangers = {path.name for path in out.iterdir()} - _OWN
    if strangers:
        raise InputError(f"{out} is not empty (it holds {min(strangers)}); choose another --out")


def run_demo(inputs: Inputs, out: Path) -> Result:
    """Runs all stages into `out`, resuming what an earlier demo there has finished, and returns the report."""
    began, resumed = time.monotonic(), (out / "clustered").exists()
    opened, clock = inputs.opened, StageTimer(owns_process=True)

    def measure(source: ParamSource, reporter: Reporter) -> Perplexity:
        return perplexity(source, inputs.text, opened.model, context=inputs.context, reporter=reporter)

    def evaluate(name: str, source: ParamSource) -> Perplexity:
        note(f"evaluating {name} on {len(inputs.text):,} tokens")
        with clock(f"evaluate {name}"), console_reporter() as reporter:
            return measure(source, reporter)

    original = evaluate("original", opened.source)
    out.mkdir(parents=True, exist_ok=True)
    alone = dataclasses.replace(PAPER.cluster, rules=inputs.cfg.cluster.rules)
    clustered_cfg = dataclasses.replace(inputs.cfg, cluster=alone, tuning=None)
    clustered_manifest = _checkpoint(out / "clustered", inputs, clustered_cfg)
    clustered = evaluate("clustered", open_checkpoint(out / "clustered"))
    tuned_manifest = _checkpoint(out / "tuned", inputs, inputs.cfg, measure)
    loaded = evaluate("tuned, loaded back", open_checkpoint(out / "tuned"))
    before = tuned_manifest["metrics"]["perplexity"]["compressed"]["perplexity"]
    if loaded.perplexity != before:
        raise RunError(f"{out / 'tuned'}: perplexity {before} before saving, {loaded.perplexity} after loading")
    sources = {
        "original": opened.source,
        "clustered": open_checkpoint(out / "clustered"),
        "tuned": open_checkpoint(out / "tuned"),
    }
    with clock("generate"):
        sentences = _sentences(opened, sources)
    demo = Demo(
        model=opened.name,
        manifests={"clustered": clustered_manifest, "tuned": tuned_manifest},
        perplexity={"original": original, "clustered": clustered, "tuned": loaded},
        stages=clock.to_dict(),
        sentences=sentences,
        seconds=time.monotonic() - began,
        resumed=resumed,
        process_peak_rss_bytes=process_peak_rss_bytes(),
    )
    return _write_results(demo, out)


def _checkpoint(
    folder: Path,
    inputs: Inputs,
    cfg: CompressConfig,
    measure: Callable[[ParamSource, Reporter], Perplexity] | None = None,
) -> dict[str, Any]:
    """Returns the manifest of a finished checkpoint, which is made unless this very run has already made it."""
    reads_text = cfg.cluster.calibrated or cfg.tuning is not None
    note(f"compressing into {folder}")
    try:
        compress_to_folder(
            inputs.opened,
            cfg,
            folder,
            calibration=inputs.calibration if reads_text else None,
            calibration_name=inputs.calibration_name if reads_text else None,
            measure=measure,
        )
    except AlreadyFinished:
        note(f"{folder} is already finished")
    return describe(folder)


def _sentences(opened: OpenedModel, sources: dict[str, ParamSource]) -> dict[str, str]:
    """Returns {name: its greedy answer to the question}, in the chat template where there is one."""
    tokenizer = opened.load_tokenizer()
    prompt = encode_prompt(tokenizer, QUESTION, chat=bool(getattr(tokenizer, "chat_template", None)))
    stops = stop_tokens(opened.config, tokenizer)
    sentences = {}
    for name, source in sources.items():
        tokens = generate(source, prompt, opened.model, max_new_tokens=NEW_TOKENS, stop_tokens=stops)
        sentences[name] = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return sentences


def _write_results(demo: Demo, out: Path) -> Result:
    """Writes the HTML report of tuned/, the table and the numbers, report.json last, and returns table and numbers."""
    page = write_report(out / "tuned", out / "report")
    lines = [
        demo_table(demo),
        f"original: the 16-bit weights that {demo.model} decodes to",
        "clustered: k-means on the weights alone, no text read (the paper's ClusComp-minus)",
        "tuned: the default recipe, clustered by activations with error feedback, then tuned block by block",
        "",
        QUESTION,
    ]
    lines += [f"{name:9}  {sentence!r}" for name, sentence in demo.sentences.items()]
    lines += [
        "",
        f"saved and loaded back: perplexity {demo.perplexity['tuned'].perplexity:.4f} both times, {out / 'tuned'}",
        f"report and numbers: {page}, {out / REPORT_NAME}",
    ]
    text = "\n".join(lines)
    atomic.write_text(out / "report.txt", text + "\n", aside=out / "report.txt.tmp")
    fields = {**demo.to_dict(), "out": str(out)}
    atomic.write_text(out / REPORT_NAME, to_json(fields) + "\n", aside=out / "report.json.tmp")
    return Result(text, fields)
