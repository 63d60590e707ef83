"""Compiles cases for the given cards, here and without a card; prints what came out, a line of JSON for each.

    echo '{"kernel": "forward", "m": 1, "shape": [8192, 8192], "g": 4}' |
      python -m pallas_kernels.verify.compile sm_80 sm_86

A process of its own, because an operation that the compiler cannot take may end the process. Needs the `aot` extra.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from jaxlib.mlir import ir

from pallas_kernels.verify.cases import Case
from pallas_kernels.verify.sass import Machine, read_machine
from pallas_kernels.verify.traffic import Access, read_accesses


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A kernel as Pallas hands it to Triton.

    Attributes:
      bytecode: the Triton module.
      grid: programs along x, y and z.
    """

    bytecode: bytes
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int


def lower(case: Case) -> Lowered:
    """Returns the one kernel of a case.

    Raises:
      ValueError: the case's function holds another number of kernels than one.
    """
    function, arguments = case.call()
    module = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found: list[Lowered] = []

    def visit(op: Any) -> Any:
        attributes = op.operation.attributes
        if op.operation.name == "stablehlo.custom_call" and "triton" in str(attributes["call_target_name"]):
            fields = ir.DictAttr(attributes["mhlo.backend_config"])
            number = {key: ir.IntegerAttr(fields[key]).value for key in _NUMBERS}
            grid = tuple(number[f"grid_{axis}"] for axis in "xyz")
            bytecode = ir.StringAttr(fields["ir"]).value_bytes
            found.append(Lowered(bytecode, grid, number["num_warps"], number["num_stages"]))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    if len(found) != 1:
        raise ValueError(f"{case.name} holds {len(found)} kernels, not one")
    return found[0]


_NUMBERS = ("num_warps", "num_stages", "grid_x", "grid_y", "grid_z")


def assemble(lowered: Lowered, arch: str, folder: Path) -> tuple[Machine, int]:
    """Returns (the machine code's numbers, bytes of shared memory of a program) for a card such as "sm_86".

    Raises:
      RuntimeError: one of the compilers failed; the text is its own.
    """
    from jax._src.lib import triton

    jax.devices()  # loads the plugins, of which the CUDA one brings Triton's compiler
    version = re.sub(r"(\d)$", r".\1", arch.removeprefix("sm_"))
    options = {"num_warps": lowered.num_warps, "num_ctas": 1, "num_stages": lowered.num_stages}
    compiled = triton.compile("CUDA", lowered.bytecode, version, **options)
    target = re.search(r"^\.target (\w+)", compiled.asm, re.MULTILINE)
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(compiled.asm)
    ptxas = _run("ptxas", "-v", f"-arch={target[1] if target else arch}", str(source), "-o", str(cubin))
    return read_machine(ptxas, _run("nvdisasm", "-c", str(cubin))), compiled.smem_bytes


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
        raise RuntimeError(f"{tool} is not installed; pip install 'cluscomp-jax[aot]'")
    return found


def report(case: Case, archs: list[str]) -> dict[str, Any]:
    """Returns {"accesses": [...], "archs": {arch: {...} or {"error": text}}} of plain values."""
    lowered = lower(case)
    accesses: list[Access] = read_accesses(lowered.bytecode, lowered.grid)
    result: dict[str, Any] = {"accesses": [dataclasses.asdict(a) for a in accesses], "archs": {}}
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                machine, shared = assemble(lowered, arch, Path(folder))
                result["archs"][arch] = dataclasses.asdict(machine) | {"shared_bytes": shared}
            except Exception as error:  # Triton's errors have no common type; the table names this one
                result["archs"][arch] = {"error": f"{type(error).__name__}: {error}"}
    return result


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call] # still registers the CUDA compiler, and looks for no card
    for line in sys.stdin:
        fields = json.loads(line)
        print(json.dumps(report(Case(**fields | {"shape": tuple(fields["shape"])}), sys.argv[1:])), flush=True)
