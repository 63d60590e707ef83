"""`cluscomp plan`: what a run needs of a card that is not here, and whether it fits."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compiler would log the missing card on every call

import jax

from cluscomp_jax.cli.arguments import PlanArguments
from cluscomp_jax.cli.mesh import parse_mesh
from cluscomp_jax.cli.outcome import DONE, FAILED, Result
from cluscomp_jax.config.finetune import FinetuneConfig, load_finetune_config
from cluscomp_jax.config.run import RECIPES, CompressConfig, load_config
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.safetensors_source import read_config
from cluscomp_jax.models.model import parse_model_config
from cluscomp_jax.plan import PRESETS, Plan, Reserve, find_target, placement, plan, preset_config
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.whole import GIB, finetuning_of
from cluscomp_jax.plan.work import LAUNCH_SECONDS
from cluscomp_jax.reporting.tables import format_bytes, format_table
from cluscomp_jax.runtime.json_files import read_object
from cluscomp_jax.runtime.reporter import console_reporter

_LEGEND = (
    "Launches are the GPU kernels that a whole run starts on one card, counted in XLA's modules; + where a loop of",
    "unknown length counts as one turn. Hours are an estimate of a whole run: operations and bytes at published rates,",
    f"and {LAUNCH_SECONDS * 1e6:g} microseconds for each launch, an assumption; nothing was run.",
)


def run(arguments: PlanArguments) -> Result:
    """Returns the plan; its exit code is 1 where the run does not fit."""
    cfg = dataclasses.replace(_settings(arguments), model=_model_config(arguments.model))
    finetune = _finetune(arguments, cfg)
    target = find_target(arguments.target)
    if not 0 <= arguments.reserve_gib < math.inf:
        raise InputError(f"--reserve-gib {arguments.reserve_gib}: it must be a number from 0")
    reserve = Reserve(arguments.memory_fraction, round(arguments.reserve_gib * GIB))
    settings: Any = jax.config
    settings.update("jax_platforms", "cpu")  # the compiler for CUDA is there all the same, and nothing runs
    settings.update("jax_enable_compilation_cache", False)  # it can store programs of absent cards, but not read them
    place = AbstractDevice(placement(target))
    with console_reporter() as reporter:
        made = plan(
            cfg, target, place, finetune=finetune, context=arguments.context, reserve=reserve, reporter=reporter
        )
    text = _text(made, arguments.model, reserve)
    return Result(text, {"model": arguments.model, **made.to_dict()}, DONE if made.fits else FAILED)


def _finetune(arguments: PlanArguments, cfg: CompressConfig) -> FinetuneConfig:
    mesh = None if arguments.mesh is None else parse_mesh(arguments.mesh)
    if arguments.finetune_config is None:
        return finetuning_of(cfg, mesh)
    given = load_finetune_config(arguments.finetune_config)
    return given if mesh is None else dataclasses.replace(given, mesh=mesh)


def _settings(arguments: PlanArguments) -> CompressConfig:
    if arguments.config is not None:
        return load_config(arguments.config, recipe=arguments.recipe)
    return RECIPES[arguments.recipe or "default"]


def _model_config(spec: str) -> Any:
    """Returns the family's config that `spec` names: a preset, a config.json, or a folder with one."""
    path = Path(spec)
    if path.is_dir():
        return read_config(path)
    if path.suffix == ".json":
        try:
            return parse_model_config(read_object(path))
        except InputError as error:
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            raise InputError(message) from None
    if spec in PRESETS:
        return preset_config(spec)
    raise InputError(f"model {spec!r} is neither a folder, a config.json nor a preset; presets: {', '.join(PRESETS)}")


def _text(made: Plan, model: str, reserve: Reserve) -> str:
    header = (
        "stage",
        "peak",
        "arguments",
        "temporaries",
        "also held",
        "largest program",
        "launches",
        "estimated hours",
    )
    rows = []
    for stage, memory in made.stages.items():
        sizes = (memory.peak_bytes, memory.argument_bytes + memory.output_bytes, memory.temp_bytes, memory.held_bytes)
        hours = f"{made.hours[stage]:.2f}" if stage in made.hours else "-"
        rows.append((stage, *map(_gib, sizes), memory.name, _launches(made, stage), hours))
    verdict = "fits" if made.fits else "does NOT fit"
    needs = made.needs
    lines = [
        format_table(header, rows),
        "",
        "arguments include results; GiB on the card, from XLA's buffer assignment ahead of time.",
        *_LEGEND,
        f"host memory about {format_bytes(needs.host_bytes)}, to finetune {format_bytes(needs.finetune_host_bytes)}; "
        f"disk {format_bytes(needs.scratch_bytes)} for activations meanwhile and "
        f"{format_bytes(needs.checkpoint_bytes)} for the result",
        f"{model} {verdict} {made.target}: at most {_gib(made.peak.peak_bytes)} GiB ({made.peak.stage}) of "
        f"{_gib(made.usable_bytes)}, which is {reserve.fraction:g} of {_gib(made.memory_bytes)} "
        f"(XLA_PYTHON_CLIENT_MEM_FRACTION) less a reserve of {_gib(reserve.bytes)}",
    ]
    return "\n".join([*lines, *made.advice()])


def _launches(made: Plan, stage: str) -> str:
    """Returns the launches of a stage, "-" where none were counted, with a + where there may be more."""
    if stage not in made.launches:
        return "-"
    counted = made.launches[stage]
    digits, _, exponent = f"{counted.launches:.1e}".partition("e")
    return f"{digits}e{int(exponent)}{'+' if counted.unknown_loops else ''}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
