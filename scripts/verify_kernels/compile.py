"""Compiles cases for the given cards, here and without a card; prints what came out, a line of JSON for each.

A process of its own, started by __main__ with the flags that have XLA dump its PTX into a folder, because an operation
that the compiler cannot take may end the process. Needs the `aot` extra.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jaxlib.mlir import ir

from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.target import Target, compiling_for, find_target, placement
from cluscomp_jax.runtime.extras import install_command
from pallas_kernels import _compat

from .cases import Case
from .sass import Machine, read_machine
from .searches import SearchCase
from .traffic import Access, read_accesses

CARDS = {"sm_80": "a100_80", "sm_86": "a6000", "sm_89": "l40s", "sm_90": "h100"}
"""{architecture: the shipped description of a card that has it}."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A GPU kernel as Pallas passes it to Triton.

    Attributes:
      bytecode: the Triton module.
      grid: programs along x, y and z.
    """

    bytecode: bytes
    grid: tuple[int, ...]


def case_of(fields: dict[str, Any]) -> Case | SearchCase:
    """Returns the case whose fields these are, as JSON has them."""
    return Case(**fields | {"shape": tuple(fields["shape"])}) if "shape" in fields else SearchCase(**fields)


def lower(case: Case | SearchCase) -> Lowered:
    """Returns the one kernel of a case; its Triton module is the same for all cards.

    Raises:
      ValueError: the case's function holds another number of kernels than one.
    """
    function, arguments = case.call()
    with _compat.lowering_for((8, 6)):
        module = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found: list[Lowered] = []

    def visit(op: Any) -> Any:
        attributes = op.operation.attributes
        if op.operation.name == "stablehlo.custom_call" and "triton" in str(attributes["call_target_name"]):
            fields = ir.DictAttr(attributes["mhlo.backend_config"])
            grid = tuple(ir.IntegerAttr(fields[f"grid_{axis}"]).value for axis in "xyz")
            found.append(Lowered(ir.StringAttr(fields["ir"]).value_bytes, grid))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    if len(found) != 1:
        raise ValueError(f"{case.name} holds {len(found)} kernels, not one")
    return found[0]


@functools.cache
def _card(arch: str) -> tuple[Target, AbstractDevice]:
    target = find_target(CARDS[arch])
    return target, AbstractDevice(placement(target))


def assemble(case: Case | SearchCase, arch: str, dump: Path) -> tuple[Machine, int]:
    """Returns (the machine code's numbers, bytes of shared memory of a program) for a card such as "sm_86".

    Args:
      dump: the folder into which this process's XLA_FLAGS have XLA write its PTX; what is in it goes.

    Raises:
      RuntimeError: one of the compilers failed, with its own text, or XLA dumped no kernel of the case.
    """
    for file in dump.iterdir():
        file.unlink()
    target, place = _card(arch)
    function, arguments = case.call()
    with compiling_for(target):
        jax.jit(function).trace(*place.like(arguments)).lower().compile()
    ptx = next((file for file in dump.glob("*.ptx") if _entry(file.read_text())), None)
    if ptx is None:
        raise RuntimeError(f"XLA dumped no PTX with a kernel of codes into {dump}")
    text = ptx.read_text()
    entry, machine = _entry(text), re.search(r"^\.target (\w+)", text, re.MULTILINE)
    cubin = dump / "kernel.cubin"
    ptxas = _run(
        "ptxas", "-v", f"-arch={machine[1] if machine else arch}", "--entry", entry, str(ptx), "-o", str(cubin)
    )
    return read_machine(ptxas, _run("nvdisasm", "-c", str(cubin))), _shared_bytes(dump, entry)


def _entry(ptx: str) -> str:
    """Returns the name of the kernel of codes in a module's PTX, "" if it holds none."""
    found = re.search(r"\.entry (code(?:book)?_\w+)\(", ptx)
    return found[1] if found else ""


def _shared_bytes(dump: Path, entry: str) -> int:
    """Returns the shared memory with which XLA launches a program of the kernel."""
    for file in dump.glob("*thunk_sequence.txt"):
        if found := re.search(rf"{entry} grid: .*shared_memory: (\d+) bytes", file.read_text()):
            return int(found[1])
    raise RuntimeError(f"XLA dumped no launch of {entry} into {dump}")


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_find(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[:500]}")
    return done.stdout + done.stderr


@functools.cache
def _find(tool: str) -> str:
    """Returns the path of a CUDA program: that of the installed packages, else that of the system."""
    packages = importlib.util.find_spec("nvidia")
    folders = map(Path, packages.submodule_search_locations or []) if packages else []
    places = [path for folder in folders for path in sorted(folder.glob(f"*/bin/{tool}"))]
    found = str(places[0]) if places else shutil.which(tool)
    if not found:
        raise RuntimeError(f"{tool} is not installed; {install_command('aot')}")
    return found


def report(case: Case | SearchCase, archs: list[str], dump: Path) -> dict[str, Any]:
    """Returns {"accesses": [...], "archs": {arch: {...} or {"error": text}}} of plain values."""
    lowered = lower(case)
    accesses: list[Access] = read_accesses(lowered.bytecode, lowered.grid)
    result: dict[str, Any] = {"accesses": [dataclasses.asdict(a) for a in accesses], "archs": {}}
    for arch in archs:
        try:
            machine, shared = assemble(case, arch, dump)
            result["archs"][arch] = dataclasses.asdict(machine) | {"shared_bytes": shared}
        except Exception as error:  # the compilers' errors have no common type; the table names this one
            result["archs"][arch] = {"error": f"{type(error).__name__}: {error}"}
    return result


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(report(case_of(json.loads(line)), sys.argv[2:], Path(sys.argv[1]))), flush=True)
