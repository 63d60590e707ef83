"""Tables as aligned text, and byte counts in words.

Takes plain numbers and the records of a CompressionSummary. Knows no model and writes no file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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


def format_codes(matrix: Mapping[str, Any]) -> str:
    """Returns the codes of a matrix record: "1024", of a trellis "1024, 4 bits each"."""
    step_bits = matrix.get("step_bits")
    return f"{matrix['num_codes']}" + ("" if step_bits is None else f", {step_bits} bits each")


def matrix_rows(matrices: Sequence[Record]) -> list[tuple[str, ...]]:
    """Returns (path, shape, g, codes, axis, bits per weight, relative error) of matrix records."""
    return [
        (
            matrix["path"],
            "x".join(str(side) for side in matrix["shape"]),
            str(matrix["g"]),
            format_codes(matrix),
            matrix["axis"],
            f"{matrix['bits_per_weight']:.3f}",
            f"{matrix['relative_error']:.5f}",
        )
        for matrix in matrices
    ]


MATRIX_HEADER = ("matrix", "shape", "g", "codes", "axis", "bits/weight", "relative error")
