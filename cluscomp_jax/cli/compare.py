"""`cluscomp compare`: several runs in one table, with --out also as an HTML page."""

from pathlib import Path
from typing import Any

from cluscomp_jax.cli.arguments import CompareArguments
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.errors import InputError
from cluscomp_jax.reporting.html.page import COMPARISON_HEADER, comparison_notices, comparison_rows, write_comparison
from cluscomp_jax.reporting.html.records import read_records
from cluscomp_jax.reporting.tables import format_table


def run(arguments: CompareArguments) -> Result:
    """Returns the table of the runs."""
    if len(arguments.models) < 2:
        raise InputError(f"compare takes two folders or more, not {len(arguments.models)}; `cluscomp report` shows one")
    runs = [read_records(folder) for folder in arguments.models]
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
        fields["page"] = str(write_comparison(runs, Path(arguments.out)))
        lines.append(f"{fields['page']}: the same as a page")
    return Result("\n".join(lines), fields)
