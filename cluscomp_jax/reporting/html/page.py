"""The pages: renders records and figures as one HTML text and writes it into a folder. Measures nothing.

Text from a checkpoint is escaped. The page loads nothing and runs no script.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from shlex import quote

from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.errors import InputError
from cluscomp_jax.reporting.html.codes import code_uses
from cluscomp_jax.reporting.html.comparison import (
    COMPARISON_HEADER,
    comparison_notices,
    comparison_rows,
    perplexity_of,
)
from cluscomp_jax.reporting.html.figures import Drawing, draw_comparison, draw_run
from cluscomp_jax.reporting.html.records import Record, ReportedRun, read_records
from cluscomp_jax.reporting.tables import format_bytes, format_codes, format_table
from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.extras import needed_for

with needed_for("a report", "report"):
    import jinja2

PAGE_NAME = "report.html"
_DRAWN = ("sizes", "perplexity", "losses", "errors", "bits", "usage", "kurtosis", "stages", "comparison")
_FILES = (PAGE_NAME, *(f"{name}.png" for name in _DRAWN))
_ASIDE = ".writing"
_OWN = {*_FILES, *(f"{name}{_ASIDE}" for name in _FILES), "writing"}  # the last by earlier versions that were killed


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page; `open`: whether its rows show without a click."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    open: bool = False


def write_report(folder: str | Path, out: Path | None = None) -> Path:
    """Writes the report of a run and a PNG of each of its figures, and returns the page's path.

    Args:
      folder: the folder of the run, finished or not.
      out: the folder of the report; None: `folder`/report. It may be absent, empty, or hold an earlier report, which
        is replaced.

    Raises:
      InputError: `folder` holds no run, or `out` holds something else than a report.
      RunError: the disk is full, or cannot be written to; an earlier report is as it was.
    """
    records = read_records(folder)
    place = Path(folder) / "report" if out is None else out
    _require_own(place)
    uses = code_uses(open_checkpoint(folder)) if records.finished else {}
    drawings = draw_run(records, uses)
    text = _render(
        title=f"{records.name}: {records.origin} compressed" if records.finished else f"{records.name}: unfinished run",
        subtitle=_subtitle(records),
        notices=_notices(records),
        facts=_facts(records),
        drawings=drawings,
        tables=[_projections(records), _matrices(records)] if records.matrices else [],
        blocks=_blocks(records),
    )
    return _store(place, text, drawings)


def write_comparison(runs: Sequence[ReportedRun], out: Path) -> Path:
    """Writes a page that compares runs and returns its path; `out` as for `write_report`."""
    _require_own(out)
    drawings = draw_comparison(runs)
    text = _render(
        title=f"{len(runs)} runs compared",
        subtitle=", ".join(sorted({run.origin for run in runs})),
        notices=comparison_notices(runs),
        facts=[],
        drawings=drawings,
        tables=[Table("Runs", COMPARISON_HEADER, comparison_rows(runs), open=True)],
        blocks=[(f"Settings of {run.name}", json.dumps(run.resolved_config, indent=1)) for run in runs],
    )
    return _store(out, text, drawings)


def _render(**fields: object) -> str:
    template = (resources.files("cluscomp_jax.reporting.html") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(**fields)


def _require_own(out: Path) -> None:
    """Raises InputError unless `out` is absent, empty, or holds an earlier report and nothing else."""
    if not out.exists():
        if not out.absolute().parent.is_dir():
            raise InputError(f"{out}: the folder {out.absolute().parent} does not exist; make it first")
    elif not out.is_dir():
        raise InputError(f"{out}: is not a folder; choose another name")
    elif strangers := sorted({entry.name for entry in out.iterdir()} - _OWN):
        raise InputError(f"{out}: holds {strangers[0]}, which is not part of a report; choose another folder")


def _store(out: Path, text: str, drawings: Sequence[Drawing]) -> Path:
    """Writes figures and page next to an earlier report, and only then puts them in its place, the page last.

    Raises:
      RunError: the disk is full, or cannot be written to. An earlier report is as it was, a new folder is gone.
    """
    files = {f"{drawing.name}.png": drawing.png() for drawing in drawings} | {PAGE_NAME: text.encode()}
    fresh = not out.exists()
    try:
        with atomic.writing(out):
            out.mkdir(exist_ok=True)
            for name, content in files.items():
                (out / f"{name}{_ASIDE}").write_bytes(content)
            (out / PAGE_NAME).unlink(missing_ok=True)
            for name in _OWN - files.keys() - {f"{name}{_ASIDE}" for name in files}:
                (out / name).unlink(missing_ok=True)
            for name in files:
                os.replace(out / f"{name}{_ASIDE}", out / name)
            atomic.sync_tree(out)
    except BaseException:
        with contextlib.suppress(OSError):
            for name in files:
                (out / f"{name}{_ASIDE}").unlink(missing_ok=True)
            if fresh:
                out.rmdir()
        raise
    return out / PAGE_NAME


def _subtitle(records: ReportedRun) -> str:
    provenance = records.provenance
    calibration = provenance.get("calibration")
    parts = [f"{records.model_config.get('model_type')} of {records.num_blocks} blocks"]
    if calibration:
        samples, length = calibration["shape"]
        what = "positions of embeddings" if calibration.get("kind") == "embeddings" else "tokens"
        parts.append(f"calibrated on {samples} x {length} {what} of {calibration['name']}")
    elif records.finished:
        parts.append("no calibration")
    if provenance.get("finished"):
        parts.append(f"finished {provenance['finished']} on {provenance.get('device')}")
    return "; ".join(parts)


def _notices(records: ReportedRun) -> list[str]:
    if records.finished:
        missing = [] if records.perplexity else [_no_perplexity(records.folder)]
        diverged = [str(block["index"]) for block in records.blocks if block.get("diverged")]
        if diverged:
            missing.append(f"Tuning stopped early where loss or gradient was not finite: block {', '.join(diverged)}.")
        return missing
    return [
        f"This run is unfinished: {len(records.blocks)} of {records.num_blocks} blocks are done; the page shows them. "
        "Times, the size of the whole model and perplexities are recorded at the end of the run. "
        "The command of the run resumes it."
    ]


def _no_perplexity(folder: str) -> str:
    place = quote(folder)
    return (
        f"No perplexity was measured. This command adds it: cluscomp evaluate {place} --text TEXT --record {place} "
        f"(then cluscomp report {place})"
    )


def _facts(records: ReportedRun) -> list[tuple[str, str]]:
    facts = []
    if records.bits_per_weight is not None:
        dense, compressed = records.matrix_bytes
        facts.append((f"{records.bits_per_weight:.3f}", "bits per weight, codebooks included"))
        facts.append(
            (f"{format_bytes(dense)} → {format_bytes(compressed)}", f"matrices, {dense / compressed:.1f} times less")
        )
    if records.totals is not None:
        size = records.totals["matrix_bits"] / 8 + records.totals["tensor_bytes"]
        facts.append((format_bytes(size), "the whole model"))
    before, after = records.perplexity.get("original"), records.own_perplexity
    if after:
        text = perplexity_of(after) if not before else f"{perplexity_of(before)} → {perplexity_of(after)}"
        facts.append((text, "perplexity"))
    if records.seconds is not None:
        facts.append((f"{records.seconds / 60:.1f} min", "wall time since the run was last started or resumed"))
    if records.peak_rss_bytes is not None:
        facts.append((format_bytes(records.peak_rss_bytes), "peak memory"))
    return facts


def _projections(records: ReportedRun) -> Table:
    """Returns the settings that ran: a row for every (projection, g, codes, axis) that matrices have."""
    groups: dict[tuple[str, int, str, str], list[Record]] = {}
    for matrix in records.matrices:
        key = (records.projection(matrix["path"]), matrix["g"], format_codes(matrix), matrix["axis"])
        groups.setdefault(key, []).append(matrix)
    rows = []
    for (name, g, codes, axis), matrices in groups.items():
        bits = sum(m["bits"] for m in matrices) / sum(math.prod(m["shape"]) for m in matrices)
        rows.append((name, str(g), codes, axis, str(len(matrices)), f"{bits:.3f}"))
    header = ("projection", "g", "codes", "axis", "matrices", "bits/weight")
    return Table("Settings by projection", header, rows, open=True)


def _matrices(records: ReportedRun) -> Table:
    header = ("matrix", "shape", "g", "codes", "axis", "bits/weight", "original", "compressed", "relative error")
    rows = [
        (
            matrix["path"],
            "x".join(map(str, matrix["shape"])),
            str(matrix["g"]),
            format_codes(matrix),
            matrix["axis"],
            f"{matrix['bits_per_weight']:.3f}",
            format_bytes(2 * matrix["shape"][0] * matrix["shape"][1]),
            format_bytes(matrix["bits"] / 8),
            f"{matrix['relative_error']:.5f}" if matrix.get("relative_error") is not None else "-",
        )
        for matrix in records.matrices
    ]
    return Table(f"All {len(rows)} matrices", header, rows)


def _blocks(records: ReportedRun) -> list[tuple[str, str]]:
    shown = []
    if records.provenance.get("command"):
        shown.append(("Command", str(records.provenance["command"])))
    shown.append(("Settings", json.dumps(records.resolved_config, indent=1)))
    if records.provenance:
        rows = list((records.provenance.get("versions") or {}).items())
        shown.append(("Versions", format_table(("package", "version"), rows)))
    return shown
