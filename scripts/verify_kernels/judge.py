"""What a compiled case must keep to, and how it is shown in the table. Knows reports, compiles nothing."""

import math
from typing import Any

from pallas_kernels.codebook_matmul.config import padded_group

from .cases import Case
from .searches import SearchCase

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}
"""Shared memory that one program may have, by card (CUDA C Programming Guide, compute capabilities)."""
PER_32_MMA = 130
DECODE_RATIO = 1.15
TRELLIS_DECODE_RATIO = 1.10
L1_KIB = 16
"""The largest codebook that L1 is assumed to hold next to the tiles in shared memory."""
SECTOR_BYTES = 32
_INDEX = 1
"""Place of the index among the arguments of a product."""
_MAIN_GROUPS = (4, 8, 16)


def failures(case: Case | SearchCase, report: dict[str, Any]) -> list[str]:
    """Returns what a report breaks, one sentence each; [] if the case passes."""
    found = []
    for arch, machine in report["archs"].items():
        if "error" in machine:
            found.append(f"{arch}: {machine['error']}")
            continue
        found += [f"{arch}: {text}" for text in _machine_failures(case, arch, machine)]
    ratio = decode_ratio(case, report) if isinstance(case, Case) else None
    if isinstance(case, Case) and ratio is not None and ratio > decode_bound(case):
        found.append(f"reads {ratio:.2f} of the least bytes, at most {decode_bound(case):.2f} are allowed")
    return found


def _machine_failures(case: Case | SearchCase, arch: str, machine: dict[str, Any]) -> list[str]:
    opcodes, found = machine["opcodes"], []
    if machine["spill_bytes"] or machine["local_instructions"]:
        found.append(f"spills {machine['spill_bytes']} bytes, {machine['local_instructions']} local instructions")
    if machine["shared_bytes"] > SHARED_KIB[arch] * 1024:
        found.append(f"{machine['shared_bytes']} bytes of shared memory, {SHARED_KIB[arch]} KiB are there")
    if isinstance(case, Case):
        found += _product_failures(case, arch, machine)
    reductions = opcodes.get("RED", 0) + opcodes.get("REDG", 0)
    others = opcodes.get("ATOM", 0) + opcodes.get("ATOMG", 0)
    if case.kernel == "scatter":
        if not reductions or others or machine["fences"]:
            found.append(f"{reductions} plain reductions, {others} other atomics, {machine['fences']} fences")
    elif reductions or others:
        found.append(f"{reductions + others} atomics where the order must be fixed")
    return found


def _product_failures(case: Case, arch: str, machine: dict[str, Any]) -> list[str]:
    opcodes, found = machine["opcodes"], []
    tensor = opcodes.get("HMMA", 0) + opcodes.get("HGMMA", 0)
    if case.kernel != "segment" and case.dtype != "float32" and not tensor:
        found.append("no tensor cores")
    if arch == "sm_86" and _is_main_loop(case) and per_32_mma(machine) > PER_32_MMA:
        found.append(
            f"{per_32_mma(machine):.0f} instructions per 32 tensor-core ones, at most {PER_32_MMA} are allowed"
        )
    return found


def per_32_mma(machine: dict[str, Any]) -> float:
    """Returns the static instructions of the inner loop per 32 tensor-core ones; 0 without any."""
    return 32 * machine["loop_instructions"] / machine["mma"] if machine["mma"] else 0.0


def _is_main_loop(case: Case) -> bool:
    """Returns whether this is a large product without masks, for which the instructions are limited."""
    aligned = not any(side % 256 for side in (case.m, *case.shape))
    return case.kernel in ("forward", "dx") and aligned and case.g in _MAIN_GROUPS and case.dtype != "float32"


def decode_bound(case: Case) -> float:
    """Returns the largest `decode_ratio` that a case may have."""
    return DECODE_RATIO if case.step_bits is None else TRELLIS_DECODE_RATIO


def least_bytes(case: Case) -> int:
    """Returns the bytes that a product must move: index, activations, codebook, result and the parts of a split sum."""
    (depth, width), itemsize, splits = case.sides, case.itemsize, case.tile.splits
    index = case.index_bytes
    parts = 2 * splits * case.m * width * 4 if splits > 1 else 0
    return index + case.m * (depth + width) * itemsize + case.n * case.g * itemsize + parts


def moved_bytes(case: Case, report: dict[str, Any]) -> int:
    """Returns the bytes that a product moves: every load as its whole block, the codebook once, stores exactly.

    Padding the codebook before the kernel is counted. Of a trellis index: see `_stream_bytes`.
    """
    itemsize, lanes = case.itemsize, padded_group(case.g)
    plain = [access for access in report["accesses"] if access["kind"] == "load" and not access["gathered"]]
    streams = [access for access in plain if case.step_bits is not None and access["argument"] == _INDEX]
    loads: int = sum(
        access["elements"] * access["itemsize"] * access["executions"] for access in plain if access not in streams
    )
    if case.step_bits is not None and streams:
        loads += _stream_bytes(case, case.step_bits, streams[0]["executions"])
    index = case.index_bytes
    padding = 2 * case.n * lanes * itemsize if lanes != case.g and case.tile.pad_codebook else 0
    return least_bytes(case) - index - case.m * case.sides[0] * itemsize + loads + padding


def _stream_bytes(case: Case, step_bits: int, executions: int) -> int:
    """Returns the bytes of the words of a trellis index that the programs of a product read, each program each once.

    A tile of codes is loaded by several loads, of its words and of each word's next. Those overlap within a program, in
    one step or from one step to the next; the second read of a word is assumed to be served by the caches. The word
    after a program's own, which belongs to the next program, counts for every line.

    Args:
      executions: of one load of the index, by all programs together.
    """
    tile, lanes = case.tile, padded_group(case.g)
    lines, groups = (tile.block_k, tile.block_n // lanes) if case.wide else (tile.block_n, tile.block_k // lanes)
    following = executions if case.wide else case.programs
    kept = case.n.bit_length() - 1 - step_bits
    return 4 * lines * (-(-executions * groups * step_bits // 32) + following * -(-kept // 32))


def decode_ratio(case: Case, report: dict[str, Any]) -> float | None:
    """Returns moved over least bytes of a one-token product of a whole model's matrix, None for other cases."""
    if not (case.kernel == "forward" and case.m == 1 and min(case.shape) >= 1024):
        return None
    return moved_bytes(case, report) / least_bytes(case)


def l2_bytes(case: Case) -> int:
    """Returns the bytes of the codebook's rows that a product gathers from L2: 32 for every row or part of one.

    A codebook of at most `L1_KIB` is assumed to stay in L1; each program reads it from L2 once.
    """
    if case.n * case.g * case.itemsize <= L1_KIB * 1024:
        return case.programs * case.n * padded_group(case.g) * case.itemsize
    row = padded_group(case.g) * case.itemsize
    times = -(-case.m // case.tile.block_m)
    return case.codes * times * SECTOR_BYTES * math.ceil(row / SECTOR_BYTES)


def row(case: Case | SearchCase, report: dict[str, Any], wrong: list[str]) -> str:
    """Returns the case's row of the table."""
    machines = list(report["archs"].values())

    def each(read: Any) -> str:
        return " ".join("-" if "error" in machine else str(read(machine)) for machine in machines)

    memory = ["-", "-", "-"]
    if isinstance(case, Case) and case.kernel in ("forward", "dx"):
        moved, least = moved_bytes(case, report), least_bytes(case)
        memory = [f"{moved / 1e6:.1f}", f"{moved / least:.2f}", f"{l2_bytes(case) / 1e6:.0f}"]
    cells = [
        case.name,
        each(lambda machine: machine["registers"]),
        each(lambda machine: machine["spill_bytes"] + machine["local_instructions"]),
        each(lambda machine: math.ceil(machine["shared_bytes"] / 1024)),
        each(
            lambda machine: (
                f"{per_32_mma(machine):.0f}" if per_32_mma(machine) and machine["opcodes"].get("HMMA") else "-"
            )
        ),
        *memory,
        "; ".join(wrong) or "pass",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| case | registers | spills | shared KiB | instructions per 32 HMMA | MB moved | over the least | "
    "MB from L2 | verdict |\n" + "|---" * 9 + "|"
)
