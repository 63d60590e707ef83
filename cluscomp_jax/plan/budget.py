"""How many samples pass through a block together: by tokens, or as many as a budget of device memory allows."""

import dataclasses
from collections.abc import Iterable

from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model
from cluscomp_jax.plan.program import Memory, Program, compile_program
from cluscomp_jax.plan.setting import layer_types_of
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.stages import PER_BLOCK, largest_alike

GIB = 2**30
_FORWARD_TOKENS = 2048
"""Tokens per batch where nothing is differentiated."""
_MOST_TOKENS = 16384
"""Tokens per batch under a budget: beyond it a pass gains nothing."""
_WITH_BATCH = ("statistics", "targets", "propagate")
"""The stages whose memory grows with the batch."""


def forward_batch(
    model: Model, cfg: CompressConfig, shape: tuple[int, ...], place: AbstractDevice | None = None
) -> int:
    """Returns the samples that pass through a block together.

    Without `cfg.device_memory_gib` as many as make up 2,048 tokens. With it the largest power of two, up to 16,384
    tokens, at which every program of a block stays within the budget; its programs are compiled to know.

    Args:
      model: the decoder.
      cfg: the run.
      shape: [samples, length] of the calibration tokens.
      place: the device; None: JAX's own.

    Raises:
      InputError: a stage needs more than the budget with single samples.
    """
    samples, length = shape
    if cfg.device_memory_gib is None:
        return max(1, _FORWARD_TOKENS // length)
    # The tokens that there are, not those that a config would have cut from a text.
    cfg = dataclasses.replace(cfg, calibration=dataclasses.replace(cfg.calibration, samples=samples, length=length))
    assert cfg.device_memory_gib is not None
    usable = int(cfg.device_memory_gib * GIB)
    place = place or AbstractDevice()
    batch = 1 << max(0, min(samples, max(1, _MOST_TOKENS // length)).bit_length() - 1)
    while batch > 1 and _largest(_programs(model, cfg, place, batch, _WITH_BATCH)).peak_bytes > usable:
        batch //= 2
    most = _largest(_programs(model, cfg, place, batch, None))
    if most.peak_bytes > usable:
        raise InputError(
            f"device_memory_gib is {cfg.device_memory_gib}; {most.stage} ({most.name}) takes "
            f"{most.peak_bytes / GIB:.3g} GiB on this device; allow as much, or see `cluscomp plan` for what needs less"
        )
    return batch


def _programs(
    model: Model, cfg: CompressConfig, place: AbstractDevice, batch: int, stages: tuple[str, ...] | None
) -> Iterable[Program]:
    for setting in layer_types_of(model, cfg, place, batch):
        for stage in PER_BLOCK:
            yield from (program for program in stage(setting) if stages is None or program.stage in stages)


def _largest(programs: Iterable[Program]) -> Memory:
    return max(map(compile_program, largest_alike(programs)), key=lambda memory: memory.peak_bytes)
