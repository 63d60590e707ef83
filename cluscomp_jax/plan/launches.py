"""The kernels that a compiled GPU program starts, counted from XLA's own text of it.

XLA's text is that of its last module: entry, bodies of loops and branches hold the instructions that run, in order.
"""

import dataclasses
import re
from collections.abc import Callable

_FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "domain", "get-tuple-element", "opt-barrier",
    "optimization-barrier", "parameter", "tuple",
}  # fmt: skip
"""Instructions that name memory and start nothing."""
_FREE_TARGETS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"}
"""Custom calls that start nothing."""
_FINISHES = ("-done", "-update")
"""Ends of the second half of an asynchronous pair."""
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Launches:
    """Kernels that one call of a program starts.

    Attributes:
      launches: kernels, those of a loop times its turns.
      unknown_loops: loops whose turns XLA does not know; each is counted as one turn.
    """

    launches: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: "Launches") -> "Launches":
        return Launches(self.launches + other.launches, self.unknown_loops + other.unknown_loops)

    def times(self, count: float) -> "Launches":
        """Returns the launches of this many turns of the same text."""
        return Launches(self.launches * count, self.unknown_loops)


def count_launches(text: str) -> Launches:
    """Returns the launches of one call of a program.

    A fusion is one launch, and so is a sort, a copy, a collective or any other instruction outside a fusion that
    computes something. A sort of a long array is one launch, although XLA's own starts several kernels for it. A custom
    call is one launch, although cuSOLVER and the radix sort of CUB start several.
    A copy or a fill of memory is one launch, whether a kernel or the driver does it. Names of memory (tuple, bitcast,
    parameter, constant) are none. Of an asynchronous pair the start counts, and the other half does not. A call counts
    what it calls, an asynchronous one and one of a command buffer (a CUDA graph) too. A loop counts its body times the
    turns that XLA knows, and its condition is not evaluated then. A loop of unknown length counts its body and its
    condition once. A conditional counts its branch of most launches. What the host reads to decide is not counted.

    Args:
      text: `compiled.as_text()` of a program compiled for a GPU.

    Raises:
      ValueError: the text has no entry, or an instruction that is not understood.
    """
    computations, entry = _computations(text)
    known: dict[str, Launches] = {}

    def count(name: str) -> Launches:
        if name not in known:
            known[name] = sum((_launches(line, count) for line in computations[name]), Launches())
        return known[name]

    return count(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns {computation: its instructions, each without its name and from its type on} and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in _COMMENT.sub("", text).splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(instruction[1])
    if not entry:
        raise ValueError("this is not the text of a compiled module: it has no ENTRY")
    return found, entry


def _launches(instruction: str, count: Callable[[str], Launches]) -> Launches:
    """Returns the launches of one instruction.

    Args:
      instruction: from its type on.
      count: returns the launches of a computation.
    """
    text = _after_type(instruction)
    operation = text.partition("(")[0].strip()
    started = operation.removesuffix("-start")
    if operation in _FREE or operation.endswith(_FINISHES):
        return Launches()
    if started == "while":
        return _loop(text, count)
    if started == "conditional":
        return max((count(name) for name in _branches(text)), key=lambda branch: branch.launches)
    if started in ("call", "async"):
        return count(_called(text, "to_apply" if started == "call" else "calls"))
    target = re.search(r' custom_call_target="([^"]*)"', text)
    return Launches() if target and target[1] in _FREE_TARGETS else Launches(1.0)


def _after_type(instruction: str) -> str:
    """Returns what follows the type, which is one word or a tuple in brackets."""
    if not instruction.startswith("("):
        return instruction.partition(" ")[2]
    depth = 0
    for place, character in enumerate(instruction):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return instruction[place + 1 :].lstrip()
    raise ValueError(f"a type does not end: {instruction[:80]}")


def _loop(text: str, count: Callable[[str], Launches]) -> Launches:
    body, turns = count(_called(text, "body")), re.search(r"known_trip_count\W*n\W*(\d+)", text)
    if turns:
        return body.times(int(turns[1]))
    return body + count(_called(text, "condition")) + Launches(unknown_loops=1)


def _branches(text: str) -> list[str]:
    named = [_called(text, f"{side}_computation") for side in ("true", "false") if f" {side}_computation=" in text]
    several = re.search(r" branch_computations=\{([^}]*)\}", text)
    names = named or ([name.strip().lstrip("%") for name in several[1].split(",")] if several else [])
    if not names:
        raise ValueError(f"a conditional names no branches: {text[:80]}")
    return names


def _called(text: str, attribute: str) -> str:
    """Returns the name of the computation that an attribute of an instruction names."""
    found = re.search(rf" {attribute}=%?([\w.\-]+)", text)
    if not found:
        raise ValueError(f"an instruction has no {attribute}: {text[:80]}")
    return found[1]
