"""One program of a run, and what XLA says of its memory and of its kernels once it is compiled.

Nothing runs: the numbers are those of XLA's buffer assignment, and of its module, for the device that the arguments are
placed on.
"""

import dataclasses
from typing import Any

import jax

from cluscomp_jax.plan.launches import Launches, count_launches
from cluscomp_jax.plan.work import Work, count_work

_GPU = ("gpu", "cuda", "rocm")
"""What JAX calls the platform of a GPU, here or described."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of the run, traced at the shapes of the run.

    Attributes:
      stage: of the run, "tune" say.
      name: what it does there.
      traced: of `jax.jit(f).trace(...)`.
      live_bytes: all that the run holds on the device when it calls the program: its arguments, each buffer once
        however often it is passed, and what waits for other programs.
      calls: how often a whole run calls it.
    """

    stage: str
    name: str
    traced: Any
    live_bytes: int
    calls: float = 1.0

    def work(self) -> Work:
        """Returns the operations and bytes of one call."""
        return count_work(self.traced.jaxpr)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Device memory while a program runs, bytes.

    Attributes:
      stage, name: of the program.
      argument_bytes: of the compiled program's arguments.
      output_bytes: of results that take new memory (donated arguments are reused).
      temp_bytes: of its temporaries, which are one allocation.
      held_bytes: what else is on the device; negative where arguments share buffers or are not read.

    Invariant: peak_bytes = argument + output + temp + held.
    """

    stage: str
    name: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    held_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All that the device holds while the program runs."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes + self.held_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as plain JSON values."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes}


def compile_program(program: Program) -> Memory:
    """Returns the memory of the program, compiled for the device its arguments are placed on.

    Raises:
      RuntimeError: the backend keeps no account of memory.
    """
    return _memory(program, program.traced.lower().compile())


def compile_counted(program: Program) -> tuple[Memory, Launches | None]:
    """Returns what `compile_program` does, and the launches of one call; None where the device is no GPU.

    Raises:
      RuntimeError: the backend keeps no account of memory.
      ValueError: the text of the compiled module is not understood.
    """
    compiled = program.traced.lower().compile()
    devices = [device for place in jax.tree.leaves(compiled.output_shardings) for device in place.device_set]
    on_gpu = any(device.platform in _GPU for device in devices)
    return _memory(program, compiled), count_launches(compiled.as_text()) if on_gpu else None


def _memory(program: Program, compiled: Any) -> Memory:
    analysis: Any = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"{program.stage}, {program.name}: {jax.default_backend()} reports no memory")
    return Memory(
        stage=program.stage,
        name=program.name,
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temp_bytes=analysis.temp_size_in_bytes,
        held_bytes=program.live_bytes - analysis.argument_size_in_bytes,
    )
