"""The plan of a whole run: every stage's programs compiled for one device, their launches, the verdict on memory."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.inference.decoder import positions_held
from cluscomp_jax.models.model import build_model
from cluscomp_jax.plan.budget import forward_batch
from cluscomp_jax.plan.host import HostRequirements, host_needs
from cluscomp_jax.plan.launches import Launches
from cluscomp_jax.plan.program import Memory, Program, compile_counted
from cluscomp_jax.plan.setting import layer_types_of
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.stages import largest_alike, whole_run
from cluscomp_jax.plan.target import Target, card_mesh, compiling_for
from cluscomp_jax.plan.work import Work, operations_of
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.training import AXES, sharding_on

GIB = 2**30
ADVICE = {
    "sensitivity": 'set mixed_precision = "none"',
    "cluster": "choose fewer codes (num_codes)",
    "statistics": "set error_feedback = false, or device_memory_gib for smaller batches",
    "correct": "set drift_correction = false",
    "assign": "set error_feedback = false",
    "tune": 'choose a smaller batch_size or length, and no compute_dtype = "float32"',
    "targets": 'choose a smaller length, and no compute_dtype = "float32"',
    "propagate": 'choose a smaller length, and no compute_dtype = "float32"',
    "recover": 'set offload_inputs = true, remat_policy = "all" and generated_samples = 0, or choose a smaller length; '
    "or leave recovery out, and finetune on a mesh",
    "evaluate": "choose a smaller length",
    "finetune": "set offload_inputs = true, or choose a smaller batch_size or length, or fewer bits",
    "generate": "choose a shorter --context or fewer bits",
}
"""{stage: what takes less memory there}; elsewhere only a card with more does."""


@dataclasses.dataclass(frozen=True)
class Reserve:
    """What a plan leaves free.

    Attributes:
      fraction: share of the card's memory that JAX may take (XLA_PYTHON_CLIENT_MEM_FRACTION, which the scripts set);
        outside it are the CUDA context and what else uses the card.
      bytes: of that share kept free for what XLA's account leaves out: fragments between buffers, scratch memory of
        libraries.
    """

    fraction: float = 0.92
    bytes: int = GIB

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"memory fraction is {self.fraction}; it must be above 0 and at most 1")
        if self.bytes < 0:
            raise InputError(f"reserve is {self.bytes} bytes; it must be 0 or more")

    def usable(self, memory_bytes: int) -> int:
        """Returns the bytes that programs and their arguments may take of a card."""
        return int(memory_bytes * self.fraction) - self.bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      target: name of the card.
      memory_bytes, usable_bytes: of the card; less what the reserve leaves free.
      stages: {stage: memory of its largest program}.
      programs: memory of every program that was compiled: of those alike but for sizes, the largest, and one of those
        that only share a name.
      launches: {stage: kernels that a whole run starts on the card}; empty where programs were compiled for no GPU.
      hours: {stage: least hours at the card's published rates}, an estimate; not of generation.
      needs: host memory and disk.
    """

    target: str
    memory_bytes: int
    usable_bytes: int
    stages: Mapping[str, Memory]
    programs: tuple[Memory, ...]
    launches: Mapping[str, Launches]
    hours: Mapping[str, float]
    needs: HostRequirements

    @property
    def peak(self) -> Memory:
        """The largest program of all."""
        return max(self.stages.values(), key=lambda memory: memory.peak_bytes)

    @property
    def fits(self) -> bool:
        """Whether every stage stays within what is usable."""
        return self.peak.peak_bytes <= self.usable_bytes

    def advice(self) -> list[str]:
        """Returns one line for each stage that does not fit."""
        lines = []
        for stage, memory in self.stages.items():
            over = memory.peak_bytes - self.usable_bytes
            if over > 0:
                change = ADVICE.get(stage, "nothing in the config changes it")
                lines.append(f"{stage} is {over / GIB:.2f} GiB too large: {change}, or take a card with more memory")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values."""
        return {
            "target": self.target,
            "memory_bytes": self.memory_bytes,
            "usable_bytes": self.usable_bytes,
            "stages": {stage: memory.to_dict() for stage, memory in self.stages.items()},
            "peak_bytes": self.peak.peak_bytes,
            "launches": {stage: round(counted.launches) for stage, counted in self.launches.items()},
            "unknown_loops": {stage: counted.unknown_loops for stage, counted in self.launches.items()},
            "estimated_hours": dict(self.hours),
            **self.needs.to_dict(),
            "fits": self.fits,
            "advice": self.advice(),
        }


def plan(
    cfg: CompressConfig,
    target: Target,
    place: AbstractDevice,
    *,
    finetune: FinetuneConfig | None = None,
    context: int,
    reserve: Reserve,
    reporter: Reporter,
) -> Plan:
    """Returns the plan of compressing cfg.model, calibration given, and of training, evaluating and running the result.

    Args:
      cfg: the run; a budget of bits is planned as if it were spent evenly.
      target: the card.
      place: arrays on that card (`placement`).
      finetune: the finetuning, whatever its model, on as many of the card as its mesh takes, of which each is planned
        for; None: `finetuning_of` the run.
      context: positions in generation, as `generation.positions_held` makes them; 32 or more.
      reserve: what must stay free.
      reporter: receives progress.

    Raises:
      InputError: rules that match nothing, or a context out of range.
    """
    if context < 32 or context != positions_held(max(context, 1)):
        raise InputError(
            f"context is {context}; it must be a power of two from 32, above 4,096 a multiple of 1,024, as generation "
            "makes it"
        )
    finetune = finetune or finetuning_of(cfg)
    if place.sharding is not None:
        cfg, finetune = _on_a_gpu(cfg, finetune)
    with compiling_for(target) if place.sharding is not None else contextlib.nullcontext():
        return _plan(cfg, target, place, finetune, context, reserve, reporter)


def _on_a_gpu(cfg: CompressConfig, finetune: FinetuneConfig) -> tuple[CompressConfig, FinetuneConfig]:
    """Returns both with the compute dtypes that they mean on a GPU."""
    tuning, recovery, training = cfg.tuning, cfg.recovery, finetune.training
    if tuning is not None:
        tuning = dataclasses.replace(tuning, compute_dtype=compute_dtype_of(tuning, "gpu"))
    if recovery is not None:
        recovery = dataclasses.replace(recovery, compute_dtype=compute_dtype_of(recovery, "gpu"))
    training = dataclasses.replace(training, compute_dtype=compute_dtype_of(training, "gpu"))
    return dataclasses.replace(cfg, tuning=tuning, recovery=recovery), dataclasses.replace(finetune, training=training)


def _plan(
    cfg: CompressConfig,
    target: Target,
    place: AbstractDevice,
    finetune: FinetuneConfig,
    context: int,
    reserve: Reserve,
    reporter: Reporter,
) -> Plan:
    model = build_model(cfg.model)
    shape = (cfg.calibration.samples, cfg.calibration.length)
    settings = layer_types_of(model, cfg, place, forward_batch(model, cfg, shape, place))
    sharding = None
    if finetune.mesh.size > 1:
        sharding = sharding_on(card_mesh(target, finetune.mesh.sizes, AXES), model)
    found = list(whole_run(settings, context=context, finetune=finetune, sharding=sharding))
    chosen = _compiled_of(found)
    reporter.start(f"compile for {target.name}", len(chosen), "programs")
    programs: list[Memory] = []
    counted: list[tuple[Program, Launches]] = []
    for program in chosen:
        memory, launches = compile_counted(program)
        programs.append(memory)
        counted += [] if launches is None else [(program, launches)]
        reporter.advance(note=f"{program.stage}: {program.name}")
    stages: dict[str, Memory] = {}
    for memory in programs:
        if memory.stage not in stages or memory.peak_bytes > stages[memory.stage].peak_bytes:
            stages[memory.stage] = memory
    works = [(program, program.work()) for program in found]
    calls = _calls(works, counted) if counted else None
    return Plan(
        target=target.name,
        memory_bytes=target.memory_bytes,
        usable_bytes=reserve.usable(target.memory_bytes),
        stages=stages,
        programs=tuple(programs),
        launches=_by_stage(found, calls) if calls else {},
        hours=_hours(works, calls, target),
        needs=host_needs(model, cfg, settings, finetune),
    )


def finetuning_of(cfg: CompressConfig, mesh: MeshConfig | None = None) -> FinetuneConfig:
    """Returns the finetuning that is planned where none is given: one row as long as the run's to each part of a batch,
    in the compute dtype of its tuning.
    """
    numbers, mesh = cfg.tuning or BlockTuningConfig(), mesh or MeshConfig()
    training = TrainingConfig(compute_dtype=numbers.compute_dtype, batch_size=mesh.row_parts)
    return FinetuneConfig(data=DataConfig(length=cfg.calibration.length), training=training, mesh=mesh)


def _compiled_of(found: list[Program]) -> list[Program]:
    """Returns the programs to compile: the largest of those alike, and one of each that does other operations."""
    chosen = largest_alike(found)
    met = {_kind(program) for program in chosen}
    for program in found:
        if _kind(program) not in met:
            met.add(_kind(program))
            chosen.append(program)
    return chosen


def _kind(program: Program) -> tuple[str, str, tuple[str, ...]]:
    return program.stage, program.name, operations_of(program.traced.jaxpr)


def _calls(works: list[tuple[Program, Work]], counted: list[tuple[Program, Launches]]) -> list[Launches]:
    """Returns the launches of one call of each program.

    Of programs of one stage and name one or two are compiled. The others have as many launches for each traced step as
    the compiled one whose steps are nearest.
    """
    twins: dict[Any, list[tuple[float, Launches]]] = {}
    for program, launches in counted:
        twins.setdefault(_kind(program), []).append((program.work().steps, launches))
    calls = []
    for program, work in works:
        steps, launches = min(twins[_kind(program)], key=lambda twin: abs(twin[0] - work.steps))
        calls.append(launches.times(work.steps / steps))
    return calls


def _by_stage(programs: Iterable[Program], calls: Iterable[Launches]) -> dict[str, Launches]:
    stages: dict[str, Launches] = {}
    for program, launches in zip(programs, calls, strict=True):
        stages[program.stage] = stages.get(program.stage, Launches()) + launches.times(program.calls)
    return stages


def _hours(works: list[tuple[Program, Work]], calls: list[Launches] | None, target: Target) -> dict[str, float]:
    done: dict[str, Work] = {}
    for place, (program, work) in enumerate(works):
        if calls is not None:
            work = dataclasses.replace(work, steps=calls[place].launches)
        if program.stage != "generate":
            done[program.stage] = done.get(program.stage, Work()) + work.times(program.calls)
    rates = {
        "matrix_rate": target.matrix_rate,
        "vector_lr_scale": target.vector_lr_scale,
        "bandwidth": target.bandwidth,
    }
    return {stage: work.least_seconds(**rates) / 3600 for stage, work in done.items()}
