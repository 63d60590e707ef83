"""What the texts of ptxas and nvdisasm say of a GPU kernel. Reads strings; runs nothing."""

import collections
import dataclasses
import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A compiled kernel in numbers.

    Attributes:
      registers: of a thread.
      spill_bytes: stored to and loaded from local memory, as ptxas counts them.
      local_instructions: loads and stores of local memory.
      mma: tensor-core instructions in the loop that has most of them; 0 without such a loop.
      loop_instructions: static instructions of that loop.
      fences: barriers of memory traffic beyond the program's own block, as an ordered atomic has them.
      opcodes: {first part of the opcode: static count} of the whole kernel.
    """

    registers: int
    spill_bytes: int
    local_instructions: int
    mma: int
    loop_instructions: int
    fences: int
    opcodes: dict[str, int]

    @property
    def per_32_mma(self) -> float | None:
        """Static instructions of the inner loop for every 32 tensor-core instructions; None without any."""
        return 32 * self.loop_instructions / self.mma if self.mma else None


def read_machine(ptxas: str, sass: str) -> Machine:
    """Returns the numbers of a kernel.

    Args:
      ptxas: what `ptxas -v` printed.
      sass: what `nvdisasm -c` printed.

    Raises:
      ValueError: either text is not what those programs print.
    """
    registers = re.search(r"Used (\d+) registers", ptxas)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    if not (registers and spills):
        raise ValueError(f"ptxas printed no register count: {ptxas[:200]!r}")
    opcodes, labels, branches = _read_instructions(sass)
    if not opcodes:
        raise ValueError(f"nvdisasm printed no instruction: {sass[:200]!r}")
    mma, size = 0, 0
    for at, label in branches:
        begin = labels.get(label, at + 1)
        found = sum(_is_mma(opcode) for opcode in opcodes[begin : at + 1])
        if found > mma:
            mma, size = found, at + 1 - begin
    counts = collections.Counter(opcode.split(".")[0] for opcode in opcodes)
    local = counts["LDL"] + counts["STL"]
    fences = sum(opcode.startswith("MEMBAR") and opcode.endswith((".GPU", ".SYS")) for opcode in opcodes)
    return Machine(int(registers[1]), int(spills[1]) + int(spills[2]), local, mma, size, fences, dict(counts))


def _is_mma(opcode: str) -> bool:
    return opcode.startswith(("HMMA", "HGMMA"))


def _read_instructions(sass: str) -> tuple[list[str], dict[str, int], list[tuple[int, str]]]:
    """Returns (opcodes, {label: place among them}, [(place of a branch, its label)])."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.search(line):
            if instruction[1].startswith("BRA") and (target := _TARGET.search(instruction[2])):
                branches.append((len(opcodes), target[1]))
            opcodes.append(instruction[1])
    return opcodes, labels, branches
