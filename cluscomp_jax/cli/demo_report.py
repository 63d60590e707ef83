"""What the demo found, as one table and as JSON. Computes sums and ratios of what was measured only."""

import dataclasses
from typing import Any

from cluscomp_jax.evaluation.perplexity import Perplexity
from cluscomp_jax.reporting.tables import format_bytes, format_table

COLUMNS = ("original", "clustered", "tuned")
_ORIGINAL_BITS = 16


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a demo found.

    Attributes:
      model: name of the original.
      manifests: of the checkpoints "clustered" and "tuned".
      perplexity, sentences: of all three COLUMNS.
      stages: {stage: {"seconds", "peak_rss_bytes"}} outside the two compressions.
      seconds: wall time of the process that wrote the report.
      resumed: whether an earlier process began it; seconds are those of the last process to work on a stage.
      process_peak_rss_bytes: largest resident set of the process that wrote the report.
    """

    model: str
    manifests: dict[str, dict[str, Any]]
    perplexity: dict[str, Perplexity]
    stages: dict[str, dict[str, Any]]
    sentences: dict[str, str]
    seconds: float
    resumed: bool
    process_peak_rss_bytes: int

    def matrix_bytes(self, column: str) -> float:
        """Returns the bytes of the compressed matrices; as 16-bit numbers in the original."""
        totals = self.manifests["tuned" if column == "original" else column]["totals"]
        bits = totals["matrix_weights"] * _ORIGINAL_BITS if column == "original" else totals["matrix_bits"]
        return float(bits) / 8

    def total_bytes(self, column: str) -> float:
        """Returns the bytes of all parameters."""
        totals = self.manifests["tuned" if column == "original" else column]["totals"]
        return self.matrix_bytes(column) + float(totals["tensor_bytes"])

    def bits_per_weight(self, column: str) -> float:
        """Returns the stored bits per weight of the compressed matrices, codebooks included."""
        return 8 * self.matrix_bytes(column) / float(self.manifests["tuned"]["totals"]["matrix_weights"])

    def compression_stages(self, column: str) -> dict[str, dict[str, Any]]:
        """Returns {stage: {"seconds", "peak_rss_bytes"}} of one compression."""
        return self.manifests[column]["metrics"]["stages"]

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of the demo: of this process, and of those that made the checkpoints."""
        earlier = (int(manifest["metrics"]["peak_rss_bytes"]) for manifest in self.manifests.values())
        return max(self.process_peak_rss_bytes, *earlier)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        tuned = self.manifests["tuned"]
        return {
            "model": self.model,
            "bits_per_weight": {column: self.bits_per_weight(column) for column in COLUMNS},
            "matrix_bytes": {column: self.matrix_bytes(column) for column in COLUMNS},
            "bytes": {column: self.total_bytes(column) for column in COLUMNS},
            "perplexity": {column: dataclasses.asdict(self.perplexity[column]) for column in COLUMNS},
            "sentences": self.sentences,
            "stages": {**self.stages, **{column: self.compression_stages(column) for column in self.manifests}},
            "seconds": self.seconds,
            "resumed": self.resumed,
            "peak_rss_bytes": self.peak_rss_bytes,
            "run_config": tuned["run_config"],
            "blocks": tuned["metrics"]["blocks"],
            "matrices": tuned["metrics"]["matrices"],
        }


def demo_table(demo: Demo) -> str:
    """Returns the one table: sizes, perplexities, then seconds and peak memory of every stage."""
    scored = demo.perplexity["original"]
    rows: list[tuple[str, ...]] = [
        ("bits per weight of the matrices", *(f"{demo.bits_per_weight(c):.2f}" for c in COLUMNS)),
        ("size of the matrices", *(format_bytes(demo.matrix_bytes(c)) for c in COLUMNS)),
        ("size of the model", *(format_bytes(demo.total_bytes(c)) for c in COLUMNS)),
        (
            f"perplexity, {scored.windows} x {scored.context} tokens",
            *(f"{demo.perplexity[c].perplexity:.2f}" for c in COLUMNS),
        ),
    ]
    rows += [(f"evaluate {c}", *_only(c, demo.stages, f"evaluate {c}")) for c in COLUMNS[:2]]
    rows.append(("evaluate tuned, loaded back", *_only("tuned", demo.stages, "evaluate tuned, loaded back")))
    names = dict.fromkeys(name for column in demo.manifests for name in demo.compression_stages(column))
    for name in names:
        cells = [_cell(demo.compression_stages(column).get(name)) for column in demo.manifests]
        rows.append((f"{name}, again" if name in demo.stages else name, "", *cells))
    whole = "demo, since it was resumed" if demo.resumed else "whole demo"
    rows.append((whole, "", "", _cell({"seconds": demo.seconds, "peak_rss_bytes": demo.peak_rss_bytes})))
    return format_table((demo.model, *COLUMNS), rows)


def _only(column: str, stages: dict[str, dict[str, Any]], name: str) -> list[str]:
    return [_cell(stages.get(name)) if other == column else "" for other in COLUMNS]


def _cell(stage: dict[str, Any] | None) -> str:
    return "" if stage is None else f"{stage['seconds']:.1f} s, {format_bytes(stage['peak_rss_bytes'])}"
