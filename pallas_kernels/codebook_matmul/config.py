"""How the GPU kernels are cut into programs. A configuration affects speed only; knows shapes, no arrays."""

import dataclasses
import math

DECODE_ROWS = 16
"""Up to this many rows of x, reading the index limits a product, not the arithmetic."""

_PROGRAMS_WANTED = 252
"""Programs that fill an RTX A6000: three on each of its 84 multiprocessors. With four, parts of the depth are so short
that ptxas unrolls their loop whole, and it spilled registers of one of them on sm_80."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """Tiles of the product a @ W.

    Attributes:
      block_m, block_n, block_k: rows, columns and depth of a tile; powers of two, the side that the codes run along
        a multiple of the padded group.
      splits: programs that share the depth of one tile; above 1 their float32 parts are summed afterwards.
      pad_codebook: rows of the codebook are padded to a power of two beforehand, so that one is one wide load.
      num_warps, num_stages: of 32 threads each; tiles in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    pad_codebook: bool = True
    num_warps: int = 8
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class Steps:
    """How the streams of a trellis index lie in a product.

    Attributes:
      bits: between two windows.
      wide: they run along the width of the matrix that is multiplied by, not along its depth.
    """

    bits: int
    wide: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScatterConfig:
    """Tiles of the codebook gradient that is summed by atomic additions.

    Attributes:
      block_row, block_group: weights of a tile across and along the groups; powers of two, the latter a multiple of
        the padded group.
      block_m: rows of x and dy added at a time.
      num_warps, num_stages: of 32 threads each; tiles in flight.
    """

    block_row: int = 128
    block_group: int = 128
    block_m: int = 32
    num_warps: int = 8
    num_stages: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """The fixed-order sum of sorted vectors by code.

    Attributes:
      block_codes: codes of a program; a power of two.
      splits: parts that the vectors of one code are cut into, summed in order afterwards.
      num_warps: of 32 threads each.
    """

    block_codes: int = 128
    splits: int = 1
    num_warps: int = 4


def padded_group(g: int) -> int:
    """Returns the smallest power of two that holds g weights."""
    return 1 << (g - 1).bit_length()


def step_period(step_bits: int) -> int:
    """Returns after how many codes of a stream a window begins with a 32-bit word again."""
    return 32 // math.gcd(step_bits, 32)


def gemm_config(
    m: int, depth: int, width: int, *, g: int, n: int, itemsize: int, steps: Steps | None = None
) -> GemmConfig:
    """Returns the tiles of a [m, depth] @ W [depth, width].

    Args:
      m, depth, width: the product's sides.
      g, n: weights per code, codes.
      itemsize: bytes of an activation.
      steps: of a trellis index; None: the index has the codes themselves.
    """
    if m <= DECODE_ROWS:
        if steps is not None:
            return _trellis_decode_config(depth, width, g=g, itemsize=itemsize, steps=steps)
        return _decode_config(depth, width, g=g, n=n, itemsize=itemsize)
    if itemsize > 2:
        return GemmConfig(block_m=64, block_n=64, block_k=32, num_stages=2)
    if m <= 64:
        return GemmConfig(block_m=64, block_n=128, block_k=64, num_warps=4)
    # Every tile down the rows of a gathers its codes again, so tall ones stall less on L2; but the masks of groups that
    # are no power of two need registers too.
    return GemmConfig(block_m=256 if g == padded_group(g) and m > 128 else 128, block_n=128, block_k=32)


def _decode_config(depth: int, width: int, *, g: int, n: int, itemsize: int) -> GemmConfig:
    """Returns the tiles for a few rows: 16 neighbouring codes, one sector of the index, at least."""
    block_n = max(128, 16 * padded_group(g))
    block_k = max(16384 // (itemsize * block_n), padded_group(g), 16)
    splits = _splits(-(-width // block_n), -(-depth // block_k))
    padding, index = 2 * n * padded_group(g) * itemsize, 2 * depth * width // g
    return GemmConfig(
        block_m=16,
        block_n=block_n,
        block_k=block_k,
        splits=splits,
        pad_codebook=padding < 0.1 * index,
        num_warps=4,
    )


def _trellis_decode_config(depth: int, width: int, *, g: int, itemsize: int, steps: Steps) -> GemmConfig:
    """Returns the tiles for a few rows and a trellis index, of at most 32 KiB.

    A program reads the word after its own of every stream too. So it has 16 words of one at least: where streams run
    along the width in a tile, where they run along the depth in all steps together. There a tile's depth is a period of
    codes, so that words can be expanded, and its width 256, as activations are read again for every tile.
    """
    lanes, largest = padded_group(g), 32768 // itemsize
    period, narrowest = lanes * step_period(steps.bits), max(128, 16 * lanes)
    if steps.wide:
        block_n = max(narrowest, min(lanes * padded_group(-(-512 // steps.bits)), 512))
        block_k = max(16384 // (itemsize * block_n), lanes, 16)
        least = 4
    else:
        block_n = max(narrowest, min(256, largest // period))
        block_k = max(16384 // (itemsize * block_n), min(period, largest // block_n), lanes, 16)
        least = max(4, -(-16 * 32 // (block_k // lanes * steps.bits)))
    large = block_n * block_k * itemsize > 16384
    return GemmConfig(
        block_m=16,
        block_n=block_n,
        block_k=block_k,
        splits=_splits(-(-width // block_n), -(-depth // block_k), least),
        num_warps=8 if large else 4,
        num_stages=2 if large else 3,
    )


def scatter_config(itemsize: int) -> ScatterConfig:
    """Returns the tiles of the atomic gradient for activations of `itemsize` bytes."""
    return ScatterConfig() if itemsize == 2 else ScatterConfig(block_row=64, block_group=64, num_stages=2)


def segment_config(num_codes: int, g: int) -> SegmentConfig:
    """Returns how the vectors of `num_codes` codes of g weights are shared out: some 65,536 sums at once."""
    block = min(512 // padded_group(g), padded_group(num_codes))
    return SegmentConfig(block_codes=block, splits=max(1, 65536 // padded_group(num_codes)))


def _splits(tiles: int, steps: int, least: int = 4) -> int:
    """Returns the parts of the depth that make enough programs, a power of two, of at least `least` steps each."""
    splits = 1
    while tiles * splits < _PROGRAMS_WANTED and steps // (2 * splits) >= least:
        splits *= 2
    return splits
