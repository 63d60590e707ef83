"""Which tokens a run reads: calibration samples, rows to train on."""

import dataclasses
from typing import Literal

from cluscomp_jax.config.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Which samples of the calibration text are used.

    Attributes:
      samples: number of samples, >= 1 (paper: 128).
      length: tokens per sample, >= 2 (paper: 2048).
      sample_offsets: file of start positions, one integer per line; None draws them from the run's seed.
      begin_windows: the model's begin token takes the place of each sample's first.
    """

    samples: int = 128
    length: int = 2048
    sample_offsets: str | None = None
    begin_windows: bool = False

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "1 or more")
        require(self.length >= 2, "length", self.length, "2 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How texts become rows of tokens to train on.

    Attributes:
      length: tokens per row, >= 2. Running text is cut into rows, a shorter last one is dropped; a conversation has a
        row of its own, padded after its end.
      responses_only: score only what the assistant says; conversations only.
      too_long: what becomes of a conversation of more tokens: "refuse" stops before any work and names its line, "cut"
        drops the tokens past the length, "skip" leaves it out.
      unusable: what becomes of a line of which a part is empty, or nothing is scored: "refuse" stops before any work
        and names it, "skip" leaves it out.
    """

    length: int = 512
    responses_only: bool = False
    too_long: Literal["refuse", "cut", "skip"] = "refuse"
    unusable: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        require(self.length >= 2, "length", self.length, "2 or more")
        require(self.unusable in ("refuse", "skip"), "unusable", self.unusable, "'refuse' or 'skip'")
        require(self.too_long in ("refuse", "cut", "skip"), "too_long", self.too_long, "'refuse', 'cut' or 'skip'")
