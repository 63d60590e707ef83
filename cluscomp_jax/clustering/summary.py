"""What a compression did, as records of numbers."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class CompressionSummary:
    """What a run did.

    Attributes:
      matrices: per matrix: path, shape, axis, g, num_codes, bits_per_weight, relative_error, weighted_error, seconds.
      blocks: per block: index, seconds, and what tuning reported, where there was any.
      stages: {stage: {"seconds", "peak_rss_bytes"}}; on a resumed run, of its last part. Peaks are None where the run
        did not have its process to itself.
      bits_per_weight: stored bits per weight of the compressed matrices together.
      total_bytes: stored bytes of all parameters.
      recovery: what the recovery stage did, as `FinetuneSummary.to_dict` gives it; None: there was none.
    """

    matrices: tuple[dict[str, Any], ...]
    blocks: tuple[dict[str, Any], ...]
    stages: dict[str, dict[str, Any]]
    bits_per_weight: float
    total_bytes: int
    recovery: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as plain JSON values, less a recovery that there was not."""
        fields = dataclasses.asdict(self)
        if self.recovery is None:
            del fields["recovery"]
        return fields
