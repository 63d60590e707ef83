"""Training of a whole model through its codebooks, with a teacher or without."""

import dataclasses
import math
from typing import Literal, get_args

from cluscomp_jax.config.checks import require, require_finite, require_pattern
from cluscomp_jax.config.numerics import Dtype, Schedule

EVERY_CODEBOOK = ".*/codebook"
"""All codebooks, as `TrainingConfig.trainable` names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How far a model follows a teacher instead of the data.

    The loss of a token is (1 - weight) times its -log p, plus weight times temperature^2 times the divergence
    KL(teacher || model) of the two distributions at that temperature.

    Attributes:
      weight: 0 to 1; 1: the data only say which texts the two are compared on.
      temperature: divides the logits of both, > 0.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_finite("weight", self.weight, low=0.0, high=1.0)
        legal = math.isfinite(self.temperature) and self.temperature > 0
        require(legal, "temperature", self.temperature, "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a whole model is trained on next tokens, indices frozen.

    Attributes:
      steps: optimiser steps, >= 1.
      trainable: regular expressions, each matched against the whole name of every array; what one of them matches
        trains. The codebook of a compressed kernel has the kernel's path followed by "/codebook"
        ("model/layers/0/mlp/up_proj/kernel/codebook"), any other array its path ("model/norm/weight").
      batch_size: sequences that pass through the model together, >= 1.
      grad_accumulation_steps: such batches per step, >= 1. The loss of a step is the mean over all its scored tokens,
        however they are divided into batches; gradients agree within rounding.
      learning_rate: peak learning rate of AdamW, > 0.
      relative_rate: as in `BlockTuningConfig`.
      vector_lr_scale: the rate of one-dimensional arrays (norm weights, biases) as a share of it, > 0.
      schedule: course of the rate after warm-up; "cosine" and "linear" fall to zero.
      warmup_fraction: share of all steps over which the rate rises linearly to its peak, 0 to 1.
      weight_decay: decoupled weight decay, >= 0.
      clip_norm: largest global gradient norm, > 0; None: no clipping.
      distillation: how far a teacher is followed; None without one.
      compute_dtype: as in `BlockTuningConfig`.
      remat_policy: what of a block is computed again in the backward pass: "all", a block keeps its input alone;
        "cheap", all but its matrix products, whose outputs it keeps: a tenth faster on a CPU, and memory for about
        7 * hidden_size + 2 * intermediate_size numbers per position and block. Changes results within rounding.
      atomic_gradients: as in `BlockTuningConfig`.
      offload_inputs: the input of every block is kept for the backward pass in pinned memory of the host; same bits,
        less device memory, more traffic. On a CPU host and device are one.
    """

    steps: int = 1000
    trainable: tuple[str, ...] = (EVERY_CODEBOOK,)
    batch_size: int = 1
    grad_accumulation_steps: int = 1
    learning_rate: float = 0.004
    relative_rate: bool = True
    vector_lr_scale: float = 0.1
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    distillation: DistillationConfig | None = None
    compute_dtype: Dtype | None = None
    remat_policy: Literal["all", "cheap"] = "all"
    atomic_gradients: bool = False
    offload_inputs: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accumulation_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(len(self.trainable) > 0, "trainable", self.trainable, "at least one regular expression")
        for pattern in self.trainable:
            require_pattern("trainable", pattern)
        for name in ("learning_rate", "vector_lr_scale"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "above 0")
        schedules, dtypes = get_args(Schedule), get_args(Dtype)
        require(self.schedule in schedules, "schedule", self.schedule, f"one of {', '.join(schedules)}")
        known = (None, *dtypes)
        require(self.compute_dtype in known, "compute_dtype", self.compute_dtype, f"one of {', '.join(dtypes)}")
        require(self.remat_policy in ("all", "cheap"), "remat_policy", self.remat_policy, "'all' or 'cheap'")
        whole = not self.offload_inputs or self.remat_policy == "all"
        require(whole, "remat_policy", self.remat_policy, "'all' where offload_inputs is true")
        require_finite("warmup_fraction", self.warmup_fraction, low=0.0, high=1.0)
        require_finite("weight_decay", self.weight_decay, low=0.0)
        if self.clip_norm is not None:
            legal = math.isfinite(self.clip_norm) and self.clip_norm > 0
            require(legal, "clip_norm", self.clip_norm, "above 0, or left out")
