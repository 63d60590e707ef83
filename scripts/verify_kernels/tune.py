"""Finds the fastest tiles of products by trying them. Knows tiles and a stopwatch; the caller brings the GPU."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from pallas_kernels.codebook_matmul.config import DECODE_ROWS, GemmConfig, padded_group
from pallas_kernels.codebook_matmul.table import Table, key_of

from .cases import Case


def candidates(case: Case) -> list[GemmConfig]:
    """Returns the heuristic's tiles of a product, first, and those near them; all can be compiled."""
    base, lanes = case.tile, padded_group(case.g)
    found = [base]
    for block_m in {base.block_m} if case.m <= DECODE_ROWS else {base.block_m, 128, 64}:
        for block_n in {base.block_n, base.block_n // 2, 2 * base.block_n}:
            for block_k in {base.block_k, 2 * base.block_k}:
                for splits in {base.splits, max(1, base.splits // 2), 2 * base.splits}:
                    sizes: dict[str, Any] = {
                        "block_m": block_m,
                        "block_n": block_n,
                        "block_k": block_k,
                        "splits": splits,
                    }
                    if min(block_n, block_k) >= max(16, lanes) and block_m * block_n <= 256 * 128:
                        found.append(dataclasses.replace(base, **sizes))
    return list(dict.fromkeys(found))


def tune(cases: Iterable[Case], time: Callable[[Case, GemmConfig], float]) -> Table:
    """Returns the fastest tiles of every product among the cases.

    Args:
      time: seconds of a case with given tiles; infinity where they cannot be compiled.
    """
    fastest = {}
    for case in cases:
        if case.kernel in ("forward", "dx"):
            sizes: dict[str, Any] = {"g": case.g, "n": case.n, "itemsize": case.itemsize}
            key = key_of(case.m, *case.sides, **sizes, steps=case.steps)
            fastest[key] = min(candidates(case), key=lambda tile, case=case: time(case, tile))  # type: ignore[misc]
    return tuple(fastest.items())
