"""How walks and searches are cut into programs. A configuration affects speed only; knows shapes, no arrays."""

import dataclasses

_PROGRAMS_WANTED = 84
"""Programs that fill an RTX A6000 once: one on each multiprocessor."""
_PAIRS = 2048
"""Pairs of a vector and a code that a program compares at a time, 8 of a thread, where it compares all codes. Where the
codes are gathered by lists it is half of that, as their addresses take registers. Of vectors of more than 6 weights,
whose codes take more registers, it is half of either."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkConfig:
    """Tiles of a walk or a search.

    Attributes:
      vectors: of a channel that a program takes; a power of two.
      codes: compared at a time; a power of two.
      num_warps: of 32 threads each.
    """

    vectors: int
    codes: int
    num_warps: int = 8


def next_power(size: int) -> int:
    """Returns the smallest power of two that is not below `size`, >= 1."""
    return 1 << (size - 1).bit_length()


def walk_config(c: int, g: int, compared: int, *, listed: bool = False) -> WalkConfig:
    """Returns the tiles of a walk.

    A program takes 16 vectors of 4 weights, or fewer where that leaves multiprocessors idle.

    Args:
      c: vectors of a channel.
      g: weights of a vector.
      compared: codes that a vector is compared with.
      listed: whether they are gathered by lists of each vector.
    """
    vectors = max(1, 64 // next_power(g))
    while vectors > 2 and -(-c // vectors) < _PROGRAMS_WANTED:
        vectors //= 2
    pairs = _PAIRS // (2 if listed else 1) // (2 if g > 6 else 1)
    return WalkConfig(vectors=vectors, codes=min(pairs // vectors, next_power(compared)))


_SHORT, _LONG = 32, 64
"""Steps of a strip of a channel: of a narrow matrix and of a wide one."""
_MARGIN = 4
"""Windows, L/b steps each, by which a strip is searched past either end."""
_LARGEST = 16384
"""Numbers of the largest codebook that a program holds in registers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathConfig:
    """How a walk of trellis paths is cut.

    Attributes:
      steps: of a strip.
      margin: steps that the window of an even strip has before and after it.
      num_warps: of 32 threads each.
    """

    steps: int
    margin: int
    num_warps: int = 8


def path_config(c: int, g: int, window_bits: int, step_bits: int) -> PathConfig | None:
    """Returns how a walk of paths is cut; None where a program cannot hold the codebook.

    Args:
      c: codes of a channel.
      g: weights of a vector.
      window_bits, step_bits: L and b.
    """
    numbers = g << window_bits
    if numbers > _LARGEST:
        return None
    window = -(-window_bits // step_bits)
    steps = _LONG if c >= 2 * _LONG * _PROGRAMS_WANTED else _SHORT
    margin = _MARGIN * window
    return PathConfig(steps=max(steps, window), margin=margin, num_warps=8 if numbers > 2048 else 4)


LISTED_TILE = 32
"""Vectors of k-means that search one list."""


def listed_config(g: int) -> WalkConfig:
    """Returns the tiles of a search of lists: a tile of vectors with 64 codes at a time, fewer of many weights."""
    return WalkConfig(vectors=LISTED_TILE, codes=64 if g <= 8 else 32, num_warps=4)


def nearest_config(g: int) -> WalkConfig:
    """Returns the tiles of a search of many vectors: 4,096 pairs, 16 codes at a time, which a thread reads once."""
    return WalkConfig(vectors=256 if g <= 4 else 128 if g <= 8 else 64, codes=16)
