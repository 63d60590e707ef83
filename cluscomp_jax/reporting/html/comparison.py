"""Runs side by side: the rows of their table, and what limits the comparison. Knows no page and no figure."""

from collections.abc import Sequence

from cluscomp_jax.reporting.html.records import ReportedRun
from cluscomp_jax.reporting.tables import format_bytes

COMPARISON_HEADER = (
    "run", "original", "bits/weight", "size", "perplexity before", "after", "tokens scored", "minutes", "peak memory",
)  # fmt: skip


def comparison_rows(runs: Sequence[ReportedRun]) -> list[tuple[str, ...]]:
    """Returns the rows under COMPARISON_HEADER; "-" where a run has no such record."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        before, after = run.perplexity.get("original"), run.own_perplexity
        size = None if run.totals is None else run.totals["matrix_bits"] / 8 + run.totals["tensor_bytes"]
        rows.append(
            (
                run.name + ("" if run.finished else " (unfinished)"),
                run.origin,
                "-" if run.bits_per_weight is None else f"{run.bits_per_weight:.3f}",
                "-" if size is None else format_bytes(size),
                perplexity_of(before),
                perplexity_of(after),
                f"{after['tokens']:,}" if "tokens" in after else "-",
                "-" if run.seconds is None else f"{run.seconds / 60:.1f}",
                "-" if run.peak_rss_bytes is None else format_bytes(run.peak_rss_bytes),
            )
        )
    return rows


def comparison_notices(runs: Sequence[ReportedRun]) -> list[str]:
    """Returns the limits of the comparison: unfinished runs, and perplexities of different texts."""
    notices = [
        f"{run.name} is unfinished: {len(run.blocks)} of {run.num_blocks} blocks" for run in runs if not run.finished
    ]
    texts = {
        (
            m.get("windows"),
            m.get("context"),
            m.get("digest") or (run.perplexity.get("original") or {}).get("perplexity"),
        )
        for run in runs
        if (m := run.own_perplexity)
    }
    if len(texts) > 1:
        notices.append("The perplexities are not of the same text and cannot be compared.")
    return notices


def perplexity_of(measured: object) -> str:
    """Returns a recorded perplexity for a table; "-" where there is none."""
    value = measured.get("perplexity") if isinstance(measured, dict) else None
    return "-" if value is None else f"{value:.3f}"
