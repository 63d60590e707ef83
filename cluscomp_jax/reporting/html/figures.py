"""The figures of a report, drawn with matplotlib from records. Knows no page and writes no file."""

import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from shlex import quote
from typing import Any

import numpy as np

from cluscomp_jax.core.coding import PLAIN, Form, TrellisCoding
from cluscomp_jax.core.losses import BLOCK_ERROR
from cluscomp_jax.reporting.html.codes import CodeUse
from cluscomp_jax.reporting.html.records import Record, ReportedRun
from cluscomp_jax.runtime.extras import needed_for

with needed_for("a report", "report"):
    import matplotlib
    import matplotlib.cm
    import matplotlib.colors
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

INK, ACCENT, SECOND, PALE = "#22303c", "#1f6f8b", "#d9703e", "#c9d6de"
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
      name: of its file, without suffix.
      title, caption: text of the page, above the figure.
      figure: the matplotlib figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """Returns the figure as a PNG."""
        with matplotlib.rc_context(_STYLE), io.BytesIO() as file:
            self.figure.savefig(file, format="png", dpi=140, metadata={"Software": None})
            return file.getvalue()

    def svg(self) -> str:
        """Returns the figure as an svg element for a page, without a size of its own, metadata or doctype."""
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.name}), io.StringIO() as file:
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            text = file.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        opening, outer = text.split(">", 1)
        opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening)
        return f'{opening} role="img" aria-label="{self.title}">{outer}'


def draw_run(records: ReportedRun, uses: Mapping[str, CodeUse]) -> list[Drawing]:
    """Returns the figures that the records of the run suffice for; `uses` is by full path of the matrix."""
    with matplotlib.rc_context(_STYLE):
        return list(_of_run(records, uses))


def draw_comparison(runs: Sequence[ReportedRun]) -> list[Drawing]:
    """Returns the figure of bits against perplexity, or none where no run has both."""
    with matplotlib.rc_context(_STYLE):
        return list(_of_runs(runs))


def _of_run(records: ReportedRun, uses: Mapping[str, CodeUse]) -> Iterator[Drawing]:
    if records.matrices:
        yield _sizes(records)
    if records.perplexity:
        yield _perplexity(records)
    if any(_number(block.get("loss_after")) for block in records.blocks):
        yield _losses(records.blocks)
    errors = {m["path"]: m["relative_error"] for m in records.matrices if _number(m.get("relative_error"))}
    maps = [
        ("errors", "Error of every matrix", "||W - decoded||² / ||W||², after clustering", errors, "YlOrRd"),
        (
            "bits",
            "Bits of every matrix",
            "stored bits per weight, codebook included",
            {m["path"]: m["bits_per_weight"] for m in records.matrices},
            "PuBu",
        ),
        (
            "usage",
            "Use of the codes",
            "2^entropy of the index / codes",
            {p: u.effective for p, u in uses.items()},
            "GnBu",
        ),
        (
            "kurtosis",
            "Kurtosis of the weights",
            "3 is a normal distribution",
            {p: u.kurtosis for p, u in uses.items()},
            "BuPu",
        ),
    ]
    for name, title, label, values, colours in maps:
        inside = {path: v for path, v in values.items() if path.startswith(f"{records.blocks_path}/")}
        if inside:
            yield _heat_map(name, title, label, inside, records, colours)
    if records.stages:
        yield _stages(records.stages)


def _of_runs(runs: Sequence[ReportedRun]) -> Iterator[Drawing]:
    points = []
    for run in runs:
        measured = run.own_perplexity.get("perplexity")
        if run.bits_per_weight is not None and measured is not None:
            points.append((run.bits_per_weight, float(measured), run.name))
    if not points:
        return
    figure, axes = _new(9, 5)
    for bits, perplexity, name in points:
        axes.plot([bits], [perplexity], "o", color=ACCENT, markersize=8)
        axes.annotate(name, (bits, perplexity), textcoords="offset points", xytext=(8, 5))
    originals = {run.perplexity["original"]["perplexity"] for run in runs if "original" in run.perplexity}
    for original in sorted(value for value in originals if _number(value)):
        axes.axhline(original, color=SECOND, linewidth=1, linestyle="--")
        axes.annotate(
            "original", (axes.get_xlim()[0], original), textcoords="offset points", xytext=(4, 4), color=SECOND
        )
    axes.margins(0.15)
    axes.set(xlabel="stored bits per weight, codebooks included", ylabel="perplexity")
    axes.grid(alpha=0.25)
    yield Drawing("comparison", "Bits against perplexity", "Lower and further left is better.", figure)


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _legend_above(axes: Any) -> None:
    """Draws the legend in one row above the axes, flush right, so that it covers no data."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=max(1, len(handles)), borderaxespad=0.2)


def _sizes(records: ReportedRun) -> Drawing:
    sums: dict[str, list[float]] = {}
    for matrix in records.matrices:
        held = sums.setdefault(records.projection(matrix["path"]), [0.0, 0.0, 0.0])
        # The record of a matrix with a tied codebook counts that codebook at its owner only.
        form = Form(tuple(matrix["shape"]), matrix["num_codes"], matrix["g"], matrix["axis"])
        step_bits = matrix.get("step_bits")
        index = (PLAIN if step_bits is None else TrellisCoding(step_bits)).index_bits(form)
        for part, bits in enumerate((16 * math.prod(matrix["shape"]), index, matrix["bits"] - index)):
            held[part] += bits / 8 / _MIB
    figure, axes = _new(9, 0.5 * len(sums) + 1.7)
    rows = np.arange(len(sums))
    dense, index_mib, books = np.array(list(sums.values())).T
    axes.barh(rows - 0.2, dense, 0.36, color=PALE, label="16-bit original")
    axes.barh(rows + 0.2, index_mib, 0.36, color=ACCENT, label="index")
    axes.barh(rows + 0.2, books, 0.36, left=index_mib, color=SECOND, label="codebooks")
    axes.set_yticks(rows, list(sums))
    axes.invert_yaxis()
    axes.set(xlabel="MiB, all blocks together")
    _legend_above(axes)
    caption = "Compressed matrices by projection, next to the same matrices as 16-bit numbers."
    return Drawing("sizes", "Where the bytes are", caption, figure)


def _perplexity(records: ReportedRun) -> Drawing:
    measured = records.perplexity
    shown = {name: float(m["perplexity"]) for name, m in measured.items() if _number(m.get("perplexity"))}
    figure, axes = _new(9, 0.55 * max(1, len(shown)) + 1.2)
    bars = axes.barh(
        list(shown), list(shown.values()), 0.5, color=[SECOND if name == records.stage else PALE for name in shown]
    )
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="perplexity, lower is better")
    first = next(iter(measured.values()))
    caption = f"{first.get('windows')} windows of {first.get('context')} tokens."
    if records.unmeasured:
        command = (
            f"cluscomp evaluate MODEL --text TEXT --context {first.get('context')} --record {quote(records.folder)}"
        )
        caption += f" Not measured: {', '.join(records.unmeasured)}. This command adds a stage: {command}"
    return Drawing("perplexity", "Perplexity by stage", caption, figure)


def _losses(blocks: Sequence[Record]) -> Drawing:
    courses = {block["index"]: course for block in blocks if (course := _course(block))}
    figure, made = _new(9, 6.8 if courses else 3.8, rows=2 if courses else 1)
    axes = made[0] if courses else made
    for key, label, colour, marker in (
        ("loss_before", "clustered", SECOND, "o"),
        ("loss_after", "as stored", ACCENT, "s"),
    ):
        points = [(b["index"], b[key]) for b in blocks if _number(b.get(key)) and b[key] > 0]
        if points:
            axes.semilogy(*zip(*points, strict=True), marker=marker, markersize=4, color=colour, label=label)
    axes.set(xlabel="block", ylabel=BLOCK_ERROR, title="Distance from the original outputs, by block")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.25)
    _legend_above(axes)
    if courses:
        _draw_courses(figure, made[1], courses)
    return Drawing("losses", "Loss per block and epoch", "On the calibration text.", figure)


def _course(block: Record) -> list[float]:
    """Returns the tuning loss of every epoch over the loss before the first; empty where the block has none."""
    losses = [block.get("loss_before"), *(block.get("epoch_losses") or [])]
    finite = [float(loss) for loss in losses if loss is not None and _number(loss)]
    if len(losses) < 2 or len(finite) < len(losses) or finite[0] <= 0:
        return []
    return [loss / finite[0] for loss in finite]


def _draw_courses(figure: Figure, axes: Any, courses: Mapping[int, Sequence[float]]) -> None:
    """Draws one line per block, coloured by block number, on a linear axis of ratios."""
    shades = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(min(courses), max(courses)),
        matplotlib.colors.LinearSegmentedColormap.from_list(
            "blocks", matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256))
        ),
    )
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle="--")
    for block, course in courses.items():
        axes.plot(range(len(course)), course, color=shades.to_rgba(np.array(block)), marker=".", label=f"block {block}")
    axes.set(xlabel="epoch (0: clustered)", ylabel="loss / loss at epoch 0", title="Tuning loss relative to epoch 0")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.25)
    if len(courses) > 1:
        bar = figure.colorbar(shades, ax=axes, label="block")
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()


def _heat_map(
    name: str, title: str, label: str, values: Mapping[str, float], records: ReportedRun, colours: str
) -> Drawing:
    names = list(dict.fromkeys(records.projection(path) for path in values))
    grid = np.full((len(names), records.num_blocks), np.nan)
    for path, value in values.items():
        block = int(path.removeprefix(f"{records.blocks_path}/").partition("/")[0])
        grid[names.index(records.projection(path)), block] = value
    figure, axes = _new(9, 0.36 * len(names) + 1.3)
    image = axes.imshow(grid, aspect="auto", cmap=colours, interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="block")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label)
    largest = max((p for p in values if _number(values[p])), key=lambda p: values[p], default=None)
    caption = "" if largest is None else f"Largest: {values[largest]:.4g}, {largest}."
    return Drawing(name, title, caption, figure)


def _stages(stages: Mapping[str, Record]) -> Drawing:
    names, panels = list(stages), [("seconds", 1.0, "seconds", ACCENT)]
    if all(_number(stage["peak_rss_bytes"]) for stage in stages.values()):  # a run as a library measures none
        panels.append(("peak_rss_bytes", 2.0**30, "GiB, peak of the stage", SECOND))
    figure, drawn = _new(9, 0.34 * len(names) + 1.4, columns=len(panels))
    for axes, (key, scale, unit, colour) in zip(np.atleast_1d(drawn), panels, strict=True):
        bars = axes.barh(names, [stages[name][key] / scale for name in names], 0.6, color=colour)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(xlabel=unit)
        if key != "seconds":
            axes.set_yticks([])
    title = "Time and memory by stage" if len(panels) > 1 else "Time by stage"
    return Drawing("stages", title, "", figure)
