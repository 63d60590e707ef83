"""`cluscomp compress`: checks everything, then compresses one model into one folder."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from cluscomp_jax.cli.arguments import DEFAULT_CONTEXT, CompressArguments
from cluscomp_jax.cli.command_line import command_line
from cluscomp_jax.cli.evaluate import check_scratch, describe, note_context
from cluscomp_jax.cli.folder import Compressed, Measure, compress_to_folder
from cluscomp_jax.cli.inputs import begin_token, read_tokens, require_windows
from cluscomp_jax.cli.outcome import Result, note
from cluscomp_jax.cli.overrides import run_config
from cluscomp_jax.clustering.resolve import Rules, bits_per_weight, check_calibration, mixes, rules_by_block
from cluscomp_jax.clustering.rules import describe as describe_rule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.models.calibration import Calibration, Embeddings, is_embeddings, read_embeddings
from cluscomp_jax.models.sharding import make_sharding
from cluscomp_jax.models.source import ParamSource
from cluscomp_jax.reporting.tables import format_bytes, format_table, stage_rows
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.text.text import begin_windows, calibration_samples, read_starts

_BITS_OF_THE_ORIGINAL = 16.0


def run(arguments: CompressArguments) -> Result:
    """Returns what the run did; with --evaluate also the perplexities before and after."""
    cfg, out = run_config(arguments), Path(arguments.out)
    opened = open_model(arguments.model)
    if opened.kind in ("compressed", "aqlm"):
        raise InputError(f"{arguments.model} is already compressed; give the original model")
    cfg = dataclasses.replace(cfg, model=opened.config)
    make_sharding(cfg.mesh, opened.model)
    by_block = rules_by_block(opened.model, cfg)
    calibration = None
    if arguments.calibration is not None:
        calibration = read_calibration(opened, cfg, arguments.calibration)
        if isinstance(calibration, Embeddings):
            samples, length = calibration.shape
            given = CalibrationConfig(
                samples=samples, length=max(2, length), begin_windows=cfg.calibration.begin_windows
            )
            cfg = dataclasses.replace(cfg, calibration=given)
        check_calibration(opened.model, cfg, calibration, by_block)
    bits = bits_per_weight(opened.model, cfg, by_block)
    if bits >= _BITS_OF_THE_ORIGINAL:
        note(
            f"{bits:.1f} bits per weight: the codebooks weigh more than the matrices; fewer codes, or --bits, take less"
        )
    measure = None if arguments.evaluate is None else _measure(opened, cfg, arguments)
    note(f"{opened.name}: {_describe_rules(cfg, by_block, calibration)}; {_describe_stages(cfg, calibration)}")
    done = compress_to_folder(
        opened,
        cfg,
        out,
        calibration=calibration,
        calibration_name=arguments.calibration,
        measure=measure,
        command=command_line(arguments),
    )
    text, fields = _text(done, out), _fields(done, out)
    if measure is not None and cfg.calibration.begin_windows:
        return Result(f"{text}\nevery window begins with the model's begin token", fields | {"begin_windows": True})
    return Result(text, fields)


def read_calibration(opened: OpenedModel, cfg: CompressConfig, spec: str) -> Calibration:
    """Returns int32 [samples, length] of a calibration text, as `cfg.calibration` says, or embeddings of a .npz file.

    Raises:
      InputError: the text, the starts or the embeddings cannot be read, or there are too few of the first two.
    """
    if is_embeddings(spec):
        return read_embeddings(spec).packed()
    settings = cfg.calibration
    note_context("--length", settings.length, opened)
    sample_offsets = None if settings.sample_offsets is None else read_starts(settings.sample_offsets)
    tokens = read_tokens(opened, spec, split="train")
    wanted = settings.samples * settings.length
    if wanted > len(tokens):
        note(
            f"{settings.samples} x {settings.length} tokens are cut from a text of {len(tokens):,}: each is used "
            f"{wanted / len(tokens):.1f} times on average; more text, or fewer --samples"
        )
    return calibration_samples(
        tokens,
        samples=settings.samples,
        length=settings.length,
        seed=cfg.seed,
        sample_offsets=sample_offsets,
        begin=begin_token(opened, spec) if settings.begin_windows else None,
    )


def _measure(opened: OpenedModel, cfg: CompressConfig, arguments: CompressArguments) -> Measure:
    assert arguments.evaluate is not None
    tokens = read_tokens(opened, arguments.evaluate, first=arguments.tokens)
    context = DEFAULT_CONTEXT if arguments.context is None else arguments.context
    require_windows(arguments.evaluate, tokens, context)
    if cfg.calibration.begin_windows:
        tokens = begin_windows(tokens, begin_token(opened, arguments.evaluate), context)
    note_context("--context", context, opened)
    check_scratch((len(tokens) // context, context), opened, "float32")

    def measure(source: ParamSource, reporter: Reporter) -> Any:
        return perplexity(source, tokens, opened.model, context=context, reporter=reporter)

    return measure


def _describe_rules(cfg: CompressConfig, by_block: list[Rules], calibration: Calibration | None) -> str:
    """Returns how finely matrices are cut, in one phrase."""
    if mixes(cfg, calibration):
        return f"{cfg.cluster.bits} bits per weight, spent on each matrix by its sensitivity"
    counts = Counter(describe_rule(rule) for rules in by_block for rule in rules.values())
    if cfg.cluster.bits is None or len(counts) == 1:
        return ", ".join(sorted(counts))
    most, count = counts.most_common(1)[0]
    return (
        f"{cfg.cluster.bits} bits per weight: {len(counts)} settings, {most} for {count} of {counts.total()} matrices"
    )


def _describe_stages(cfg: CompressConfig, calibration: Calibration | None) -> str:
    """Returns which stages of the method will run, in one phrase."""
    if calibration is None:
        return "clustering only (ClusComp-), without --calibration"
    samples, length = calibration.shape
    positions = "positions of embeddings" if isinstance(calibration, Embeddings) else "tokens"
    weighted = "activation-weighted clustering" if cfg.cluster.weighted else "clustering"
    if cfg.cluster.error_feedback:
        weighted += " with error feedback"
    stages = [weighted]
    if cfg.tuning is not None:
        stages.append(f"{_count(cfg.tuning.epochs, 'epoch')} of tuning")
    if cfg.recovery is not None:
        stages.append(f"{_count(cfg.recovery.steps, 'step')} of recovery")
    only = " only" if len(stages) == 1 else ""
    begun = ", every sample begun by the begin token" if _begins(cfg, calibration) else ""
    return f"{', '.join(stages)}{only}, {samples} x {length} {positions}{begun}"


def _begins(cfg: CompressConfig, calibration: Calibration) -> bool:
    return cfg.calibration.begin_windows and not isinstance(calibration, Embeddings)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _text(done: Compressed, out: Path) -> str:
    summary = done.summary
    whole = {"seconds": done.seconds, "peak_rss_bytes": done.peak_rss_bytes}
    lines = [
        format_table(("stage", "seconds", "peak memory"), stage_rows({**done.stages, "whole run": whole})),
        "",
        f"{out}: {summary.bits_per_weight:.3f} bits per weight, {format_bytes(summary.total_bytes)} in all, "
        f"{done.seconds:.1f} s",
    ]
    if done.diverged_blocks:
        blocks = ", ".join(map(str, done.diverged_blocks))
        lines.append(f"tuning stopped early where loss or gradient was not finite: block {blocks}")
    lines += [f"{name}: {describe(measured)}" for name, measured in done.perplexity.items()]
    return "\n".join(lines)


def _fields(done: Compressed, out: Path) -> dict[str, Any]:
    fields = done.to_dict()
    return {
        "out": str(out),
        "bits_per_weight": fields["bits_per_weight"],
        "bytes": fields["total_bytes"],
        "seconds": fields["seconds"],
        "stages": fields["stages"],
        "peak_rss_bytes": fields["peak_rss_bytes"],
        "diverged_blocks": done.diverged_blocks,
        "perplexity": fields["perplexity"],
    }
