"""What people read of a run: tables as text, sizes in words, and the figure of a compression.

Takes plain numbers and the records of a CompressionSummary. Knows no model, and writes no file but the figure.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.core.codebook import index_bits, index_shape

Record = Mapping[str, Any]


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns aligned lines of text: the first column to the left, all others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Returns bytes in the largest of B, KiB, MiB, GiB, TiB that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def stage_rows(stages: Mapping[str, Record]) -> list[tuple[str, str, str]]:
    """Returns (stage, seconds, peak memory) of {stage: {"seconds", "peak_rss_bytes"}}; a peak of None is "-"."""
    peaks = [stage["peak_rss_bytes"] for stage in stages.values()]
    words = ["-" if peak is None else format_bytes(peak) for peak in peaks]
    return [(name, f"{stages[name]['seconds']:.1f}", peak) for name, peak in zip(stages, words, strict=True)]


def matrix_rows(matrices: Sequence[Record]) -> list[tuple[str, ...]]:
    """Returns (path, shape, g, codes, axis, bits per weight, index entropy, relative error) of matrix records."""
    return [
        (
            matrix["path"],
            "x".join(str(side) for side in matrix["shape"]),
            str(matrix["g"]),
            str(matrix["num_codes"]),
            matrix["axis"],
            f"{matrix['bits_per_weight']:.3f}",
            f"{matrix['index_entropy']:.2f}/{index_bits(matrix['num_codes'])}",
            f"{matrix['relative_error']:.5f}",
        )
        for matrix in matrices
    ]


MATRIX_HEADER = ("matrix", "shape", "g", "codes", "axis", "bits/weight", "entropy", "relative error")


def entropy_saving(matrices: Sequence[Record]) -> float:
    """Returns the share of all stored bits that a perfect entropy coder of the indices would save."""
    saved = sum(
        (index_bits(matrix["num_codes"]) - matrix["index_entropy"])
        * math.prod(index_shape(tuple(matrix["shape"]), matrix["g"], matrix["axis"]))
        for matrix in matrices
    )
    return float(saved / sum(matrix["bits"] for matrix in matrices))


def error_map(matrices: Sequence[Record], blocks_path: str) -> tuple[list[str], np.ndarray]:
    """Returns (names, errors float [names, blocks]) of the matrices below `blocks_path`; absent ones are NaN.

    Args:
      matrices: matrix records with "path" and "relative_error".
      blocks_path: e.g. "model/layers"; a path below it reads "<blocks_path>/<block>/<name>".
    """
    found: dict[tuple[str, int], float] = {}
    for matrix in matrices:
        block, _, name = matrix["path"].removeprefix(f"{blocks_path}/").partition("/")
        found[name.removesuffix("/kernel"), int(block)] = matrix["relative_error"]
    names = list(dict.fromkeys(name for name, _ in found))
    errors = np.full((len(names), 1 + max(block for _, block in found)), np.nan)
    for (name, block), error in found.items():
        errors[names.index(name), block] = error
    return names, errors


def save_figure(path: Path, blocks: Sequence[Record], matrices: Sequence[Record], *, blocks_path: str) -> None:
    """Writes a PNG: the output error of every block before and after tuning, and the error of every matrix.

    Args:
      path: of the PNG.
      blocks: block records; those with "loss_before" and "loss_after" are drawn.
      matrices: see `error_map`; at least one.
      blocks_path: see `error_map`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tuned = [block for block in blocks if "loss_before" in block and "loss_after" in block]
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    losses, heat = figure.subplots(2, 1, height_ratios=(3, 2))
    for name, label, marker in (("loss_before", "clustered", "o"), ("loss_after", "tuned", "s")):
        points = [(block["index"], block[name]) for block in tuned if block[name] and np.isfinite(block[name])]
        if points:
            losses.semilogy(*zip(*points, strict=True), marker=marker, label=label)
    losses.set(title="Output error of each block on the calibration text", xlabel="block", ylabel="mean squared error")
    losses.grid(alpha=0.3)
    if tuned:
        losses.legend()
    names, errors = error_map(matrices, blocks_path)
    image = heat.imshow(errors, aspect="auto", cmap="viridis", interpolation="nearest")
    heat.set_yticks(range(len(names)), names)
    heat.set(title="Relative squared error of each matrix after clustering", xlabel="block")
    figure.colorbar(image, ax=heat)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
