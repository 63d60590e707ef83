"""Times of the GPU kernels on the shapes of Llama-2-7B and 70B, then tuned tiles, as far as the time allows."""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from check_card.step import Step
from pallas_kernels.codebook_matmul.config import DECODE_ROWS, GemmConfig
from pallas_kernels.codebook_matmul.table import Table, write_table
from verify_kernels import measure
from verify_kernels.cases import Case, Kernel
from verify_kernels.tune import candidates, tune

_SHAPES = ((4096, 11008), (8192, 28672), (4096, 4096), (8192, 8192))
"""gate_proj and q_proj of Llama-2-7B and of 70B."""
_GRADIENTS: tuple[Kernel, ...] = ("dx", "segment", "scatter")
_FOR_TUNING = 0.4
"""Share of the step's time that is kept for tiles."""


def cases(dry: bool) -> list[Case]:
    """Returns the cases, the most informative first."""
    if dry:
        few = [Case(kernel=kernel, m=20, shape=(24, 16), g=4, n=10) for kernel in _GRADIENTS[1:]]
        return [Case(kernel="forward", m=1, shape=(24, 16), g=4, n=10), *few]
    return list(_cases())


def _cases() -> Iterator[Case]:
    for g in (4, 8, 16):
        for shapes in (_SHAPES[:2], _SHAPES[2:]):
            for shape in shapes:
                yield Case(kernel="forward", m=1, shape=shape, g=g)
                yield Case(kernel="forward", m=2048, shape=shape, g=g)
                for kernel in _GRADIENTS:
                    yield Case(kernel=kernel, m=2048, shape=shape, g=g)
    for shape in _SHAPES:
        for g in (4, 8, 16):
            for n in (4096, 256):
                yield Case(kernel="forward", m=1, shape=shape, g=g, n=n)


def run(step: Step) -> None:
    """Measures the cases in rounds: programs of a round compile side by side, then each runs alone."""
    waiting = cases(step.dry)
    every, workers = list(waiting), min(8, os.cpu_count() or 1)
    implementation, calls = ("interpret", 1) if step.dry else ("triton", 8)
    begin, size = step.remaining, 2
    with ThreadPoolExecutor(workers) as pool:
        while waiting and step.remaining > _FOR_TUNING * begin:
            round_, waiting = waiting[:size], waiting[size:]
            size = min(2 * size, workers)  # small at first: nothing is recorded before a round is compiled
            compiling = [
                pool.submit(measure.compile_case, case, implementation=implementation, calls=calls) for case in round_
            ]
            ready = [_result(step, case, future) for case, future in zip(round_, compiling, strict=True)]
            for case, programs in zip(round_, ready, strict=True):
                _measure(step, case, programs, calls)
        step.fact("cases", measured=len(every) - len(waiting), left_out=[case.name for case in waiting])
        _tune(step, every, pool, calls)


def _result(step: Step, case: Case, future: Any) -> Any:
    """Returns what a thread compiled; None, and a fact, where it failed."""
    try:
        return future.result()
    except Exception as error:
        step.fact(case.name, right=False, failed=f"{type(error).__name__}: {error}"[:300])
        return None


def _measure(step: Step, case: Case, programs: measure.Programs | None, calls: int) -> None:
    if programs is None:
        return
    try:
        found = measure.measure(case, calls=calls, repeats=2 if step.dry else 5, programs=programs)
    except Exception as error:
        step.fact(case.name, right=False, failed=f"{type(error).__name__}: {error}"[:300])
        return
    seconds, limit = found.kernel_us / 1e6, measure.LIMITS[case.dtype]
    index_bytes = case.index_bytes
    step.fact(
        case.name,
        right=found.error <= limit,
        kernel_us=found.kernel_us,
        decoded_us=found.decoded_us,
        dense_us=found.dense_us,
        index_bytes_per_second=index_bytes / seconds,
        operations_per_second=2 * case.m * case.shape[0] * case.shape[1] / seconds,
        error=found.error,
        limit=limit,
        products_in_a_program=programs.copies,
        bytes_of_their_indices=index_bytes * programs.copies,
    )


def _tune(step: Step, every: list[Case], pool: ThreadPoolExecutor, calls: int) -> None:
    """Tries tiles of one product after the other while there is time; writes the table after each."""
    products = [case for case in every if case.kernel in ("forward", "dx")]
    products.sort(key=lambda case: (case.shape not in _SHAPES[:2], case.m > DECODE_ROWS))
    table: Table = ()
    longest, untuned = 0.0, []
    for case in products[:1] if step.dry else products:
        began = step.remaining
        if began < 1.3 * longest + 5.0 and not step.dry:
            untuned.append(case.name)
            continue
        tiles = candidates(case)[: 2 if step.dry else None]
        compiling = partial(measure.compile_tile, case, calls=calls, interpret=step.dry)
        programs = list(pool.map(partial(_compiled, compiling), tiles))
        times = measure.time_programs(case, programs, calls=calls, repeats=2 if step.dry else 4)
        known = dict(zip(tiles, times, strict=True))
        (entry,) = tune([case], lambda _, tile, known=known: known.get(tile, float("inf")))  # type: ignore[misc]
        table = (*table, entry)
        _write(step.tiles, table)
        best, refused = entry[1], sum(program is None for program in programs)
        numbers = {"product": list(entry[0]), "tile": dataclasses.asdict(best), "tried": len(tiles), "refused": refused}
        step.fact("tile", case=case.name, **numbers, seconds=known[best], heuristic_seconds=known[tiles[0]])
        longest = max(longest, began - step.remaining)
    step.fact("tiles", file=step.tiles.name if table else None, products=len(table), not_tried=untuned)


def _compiled(compile_tile: Any, tile: GemmConfig) -> Any:
    """Returns the program of a tile; None where it cannot be compiled, for whatever reason."""
    try:
        return compile_tile(tile)
    except Exception:
        return None


def _write(path: Path, table: Table) -> None:
    """Puts the table in the place of the one that this step wrote before."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)
    write_table(aside, table)
    os.replace(aside, path)
