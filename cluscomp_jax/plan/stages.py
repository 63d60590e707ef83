"""The stages of a run and the programs of each: the one list that plans and budgets go through.

A stage is a function of a BlockSpec that yields its programs; PER_BLOCK lists what compression does with a block.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.plan import block_programs, cluster_programs, model_programs, sensitivity_programs, training_programs
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import BlockSpec
from cluscomp_jax.plan.shapes import nbytes
from cluscomp_jax.training import Sharding

Stage = Callable[[BlockSpec], Iterator[Program]]
PER_BLOCK: tuple[Stage, ...] = (
    cluster_programs.clustering,
    block_programs.targets,
    block_programs.tuning,
    block_programs.propagation,
)
"""What compression does with every block, in order."""


def whole_run(
    settings: list[BlockSpec], *, context: int, finetune: FinetuneConfig, sharding: Sharding | None = None
) -> Iterator[Program]:
    """Yields every program of compression, finetuning, evaluation and generation; only finetuning is sharded."""
    yield from sensitivity_programs.measuring(settings)
    yield from model_programs.embedding(settings[0])
    for setting in settings:
        for stage in PER_BLOCK:
            yield from stage(setting)
    if (recovery := settings[0].cfg.recovery) is not None:
        data = DataConfig(length=settings[0].cfg.calibration.length)
        yield from model_programs.continuing(settings, recovery, "recover")
        following = dataclasses.replace(recovery.finetune_config(), data=data)
        yield from training_programs.finetuning(settings, following, stage="recover", evaluated=False)
    yield from training_programs.finetuning(settings, finetune, sharding)
    yield from model_programs.evaluation(settings[0])
    yield from model_programs.generating(settings, context=context)


def largest_alike(programs: Iterable[Program]) -> list[Program]:
    """Returns, of all programs of one stage and name, those with the largest arguments and with most other bytes held.

    Temporaries grow with the sizes of arguments, so no other one needs more than these two together.
    """
    groups: dict[tuple[str, str], list[Program]] = {}
    for program in programs:
        groups.setdefault((program.stage, program.name), []).append(program)
    chosen: list[Program] = []
    for group in groups.values():
        sizes = {id(program): _own_bytes(program) for program in group}
        most = max(group, key=lambda program: (sizes[id(program)], program.live_bytes))
        fullest = max(group, key=lambda program: (program.live_bytes, sizes[id(program)]))
        chosen += [most] if most is fullest else [most, fullest]
    return chosen


def _own_bytes(program: Program) -> int:
    return nbytes((program.traced.in_avals, program.traced.out_info))
