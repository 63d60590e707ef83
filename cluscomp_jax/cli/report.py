"""`cluscomp report`: one HTML page of a run, and the PNGs of its figures."""

from pathlib import Path

from cluscomp_jax.cli.arguments import ReportArguments
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.reporting.html.page import write_report


def run(arguments: ReportArguments) -> Result:
    """Returns where the report is."""
    page = write_report(arguments.model, None if arguments.out is None else Path(arguments.out))
    figures = sorted(str(path) for path in page.parent.glob("*.png"))
    return Result(
        f"{page}: one page, and {len(figures)} figures as PNG in the same folder",
        {"page": str(page), "figures": figures},
    )
