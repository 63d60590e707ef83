"""`cluscomp compare`: several runs in one table, with --out also as an HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluscomp_jax.cli.arguments import CompareArguments
from cluscomp_jax.cli.outcome import FAILED, Result, note
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.reporting.html.comparison import COMPARISON_HEADER, comparison_notices, comparison_rows
from cluscomp_jax.reporting.html.records import ReportedRun, read_records
from cluscomp_jax.reporting.tables import format_table


def run(arguments: CompareArguments) -> Result:
    """Returns the table of the runs."""
    if len(arguments.models) < 2:
        raise InputError(f"compare takes two folders or more, not {len(arguments.models)}; `cluscomp report` shows one")
    runs = [read_records(folder) for folder in arguments.models]
    _require_one_tokenizer(arguments.models, runs)
    lines = [format_table(COMPARISON_HEADER, comparison_rows(runs)), *comparison_notices(runs)]
    fields: dict[str, Any] = {
        "runs": [
            {
                "folder": folder,
                "finished": run.finished,
                "bits_per_weight": run.bits_per_weight,
                "stage": run.stage,
                "perplexity": dict(run.perplexity),
                "seconds": run.seconds,
                "peak_rss_bytes": run.peak_rss_bytes,
            }
            for folder, run in zip(arguments.models, runs, strict=True)
        ],
        "page": None,
    }
    if arguments.out is not None:
        from cluscomp_jax.reporting.html.page import write_comparison  # here, because it needs the extra report

        try:
            fields["page"] = str(write_comparison(runs, Path(arguments.out)))
        except RunError as error:  # the table is still shown
            note(f"error: {error}")
            return Result("\n".join(lines), fields, FAILED)
        lines.append(f"{fields['page']}: the same as a page")
    return Result("\n".join(lines), fields)


def _require_one_tokenizer(folders: Sequence[str], runs: Sequence[ReportedRun]) -> None:
    """Raises InputError where two runs name two tokenizers: their perplexities are of different tokens."""
    named = [(folder, run.provenance.get("tokenizer")) for folder, run in zip(folders, runs, strict=True)]
    known = [(folder, digest) for folder, digest in named if digest is not None]
    for folder, digest in known[1:]:
        first, expected = known[0]
        if digest != expected:
            raise InputError(
                f"{first} and {folder} have two tokenizers ({expected[:12]}, {digest[:12]}), so their perplexities "
                "are of different tokens; compare them one by one with `cluscomp report`"
            )
