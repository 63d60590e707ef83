"""The frozen settings of each stage. They check their own ranges and know nothing of how they are used."""

import dataclasses
import math
import re
from typing import Literal, get_args

import jax

from cluscomp_jax.core.codebook import MAX_CODES, MAX_GROUP, Axis
from cluscomp_jax.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["constant", "cosine", "linear"]
TieCodebooks = Literal["none", "input", "block"]

DECODER_KERNELS = r"model/layers/\d+/(self_attn/[qkvo]_proj|mlp/(gate|up|down)_proj)/kernel"
"""The seven projections of every decoder block; embeddings, norms and lm_head stay in 16 bit (paper section 4)."""


def _require(holds: bool, name: str, value: object, legal: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r}; it must be {legal}")


def _require_finite(name: str, value: float, *, low: float, high: float = math.inf) -> None:
    _require(math.isfinite(value) and low <= value <= high, name, value, f"a number from {low} to {high}")


def _require_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{name} holds {pattern!r}, which is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionRule:
    """Matrices whose whole path matches `pattern` are cut into vectors of `group_size` weights along `axis`.

    Attributes:
      pattern: regular expression, matched against the whole path.
      group_size: weights per code, g of the paper, 1 to 32.
      num_codes: codes per codebook, 2 to 65536.
      axis: the axis of the kernel [d_in, d_out] that is cut.
    """

    pattern: str = DECODER_KERNELS
    group_size: int = 4
    num_codes: int = 65500
    axis: Axis = "out"

    def __post_init__(self) -> None:
        _require(1 <= self.group_size <= MAX_GROUP, "group_size", self.group_size, f"1 to {MAX_GROUP}")
        _require(2 <= self.num_codes <= MAX_CODES, "num_codes", self.num_codes, f"2 to {MAX_CODES}")
        _require(self.axis in ("out", "in"), "axis", self.axis, "'out' or 'in'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How matrices become codebooks.

    Attributes:
      rules: the first rule whose pattern matches decides; what no rule matches stays dense.
      bits: a budget in stored bits per weight instead of g and num_codes: every rule keeps its pattern and axis,
        and (g, num_codes) are chosen to meet the budget. None: the rules are used as they are.
      mixed_precision: how a budget is spent where calibration is given: "none": one (group_size, num_codes) for all;
        "per_matrix": one for every matrix, by the measured sensitivity of the model's loss; every block is compiled
        anew.
      tie_codebooks: which projections of a block have one codebook: "none"; "input": those that read one input (q, k
        and v; gate and up); "block": all; as far as their rules give them one (g, num_codes, axis). Worth its while
        where codebooks are large compared with their matrices (docs/experiments.md).
      export: the form the result is meant for: "aqlm" restricts a budget, and refuses rules, to what an AQLM
        checkpoint can hold: one (g, num_codes) and axis for all matrices, g dividing every cut axis.
      iterations: Lloyd iterations, >= 0 (paper: 20).
      weighted: weight each vector by the mean square of its input channel, E[x_i^2], from calibration; used for
        axis "out" only, and only where calibration is given.
      error_feedback: choose the codes of one input channel after another, each making good the errors before it, by the
        the Hessian E[x x^T] from calibration; used for axis "out" only, and only where calibration is given.
      damping: share of the mean of E[x_i^2] added to the Hessian's diagonal, > 0.
      drift_correction: before a kernel is clustered, move it towards what gives the original model's outputs from the
        compressed model's inputs (`cluscomp_jax.clustering.drift_correction`); with error feedback only.
      ridge: regularisation of the drift correction, as a share of the mean of E[x_i^2], > 0.
      true_sequential: inside a block, kernels see the outputs of those clustered before them, not of the original ones;
        with error feedback only.
      massive_activation_limit: a position whose output of the block has more than this many times the median mean
        square has proportionally less weight in the Hessian, >= 0; 0: all weigh the same; with error feedback only.
      refine_rounds: rounds in which every channel is assigned again, given all other errors, and the codebook is
        updated by least squares, >= 0; with error feedback only.
      codebook_dtype: 16-bit type codebooks are stored and evaluated in; a matrix with codes beyond the range of
        float16 is kept in bfloat16.
    """

    rules: tuple[CompressionRule, ...] = (CompressionRule(),)
    bits: float | None = None
    mixed_precision: Literal["none", "per_matrix"] = "none"
    tie_codebooks: TieCodebooks = "none"
    export: Literal["any", "aqlm"] = "any"
    iterations: int = 20
    weighted: bool = True
    error_feedback: bool = True
    damping: float = 0.01
    drift_correction: bool = True
    ridge: float = 1.0
    true_sequential: bool = True
    massive_activation_limit: float = 4.0
    refine_rounds: int = 3
    codebook_dtype: Literal["bfloat16", "float16"] = "float16"

    def __post_init__(self) -> None:
        _require(len(self.rules) > 0, "rules", self.rules, "at least one rule")
        _require(
            self.mixed_precision in ("none", "per_matrix"),
            "mixed_precision",
            self.mixed_precision,
            "'none' or 'per_matrix'",
        )
        _require(
            self.tie_codebooks in ("none", "input", "block"),
            "tie_codebooks",
            self.tie_codebooks,
            "'none', 'input' or 'block'",
        )
        _require(self.export in ("any", "aqlm"), "export", self.export, "'any' or 'aqlm'")
        if self.mixed_precision != "none":
            _require(
                self.bits is not None,
                "mixed_precision",
                self.mixed_precision,
                "'none' without a budget to spend (bits)",
            )
            _require(
                self.export == "any",
                "mixed_precision",
                self.mixed_precision,
                "'none' where export is 'aqlm', which has one setting",
            )
        _require(self.iterations >= 0, "iterations", self.iterations, "0 or more")
        _require(math.isfinite(self.damping) and self.damping > 0, "damping", self.damping, "above 0")
        _require_finite("massive_activation_limit", self.massive_activation_limit, low=0.0)
        _require(math.isfinite(self.ridge) and self.ridge > 0, "ridge", self.ridge, "above 0")
        _require(self.refine_rounds >= 0, "refine_rounds", self.refine_rounds, "0 or more")
        _require(
            self.codebook_dtype in ("bfloat16", "float16"),
            "codebook_dtype",
            self.codebook_dtype,
            "'bfloat16' or 'float16'",
        )
        if self.bits is not None:
            _require(math.isfinite(self.bits) and self.bits > 0, "bits", self.bits, "a positive number")

    @property
    def calibrated(self) -> bool:
        """Whether clustering looks at the activations."""
        return self.weighted or self.error_feedback

    @property
    def uneven(self) -> bool:
        """Whether a bit budget is spent by sensitivities, which calibration is needed for."""
        return self.mixed_precision != "none"

    @property
    def corrects(self) -> bool:
        """Whether kernels are corrected for drifted inputs."""
        return self.error_feedback and self.drift_correction


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Which samples of the calibration text are used.

    Attributes:
      samples: number of samples, >= 1 (paper: 128).
      length: tokens per sample, >= 2 (paper: 2048).
      starts: file of start positions, one integer per line; None draws them from the run's seed.
    """

    samples: int = 128
    length: int = 2048
    sample_offsets: str | None = None

    def __post_init__(self) -> None:
        _require(self.samples >= 1, "samples", self.samples, "1 or more")
        _require(self.length >= 2, "length", self.length, "2 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTuningConfig:
    """Block-wise error minimisation (paper section 3.3): what trains of one block at a time, indices frozen.

    A block whose last epoch ran at a higher loss than that of its clustered codebooks is measured once more, and
    keeps those if they are better.

    Attributes:
      epochs: passes over the calibration samples, >= 0.
      batch_size: samples per step, >= 1. Must divide the number of training samples.
      learning_rate: peak learning rate of AdamW, > 0; as `relative_rate` says.
      relative_rate: the rate is a share of each array's root mean square, so that it means the same whatever the scale
        of a model's weights. False: it is absolute, as in the paper's recipe; an array that is all zero needs that.
      schedule: course of the rate after warm-up; "cosine" and "linear" fall to zero.
      warmup_fraction: share of all steps over which the rate rises linearly to its peak, 0 to 1; of w such steps the
        first has 1/w of it.
      weight_decay: decoupled weight decay, >= 0.
      clip_norm: largest global gradient norm, > 0; None: no clipping.
      aug_loss: also match the original block's output on the compressed stream (official option, off by default).
      massive_activation_limit: a position whose target has more than this many times the median mean square weighs in
        proportion less in the loss, >= 0; 0: all weigh the same.
      norms: train the block's one-dimensional parameters too (norm weights, biases), at a tenth of the rate; they are
        then stored in the dtype of codebooks.
      compute_dtype: dtype of activations and decoded weights; masters and Adam's moments stay float32. None: bfloat16
        on a GPU, whose float32 products take eight times as long; float32 elsewhere (`compute_dtype_of`).
      activation_dtype: dtype of the stored activation streams.
      validation_samples: samples kept out of tuning and scored after each epoch, >= 0; the epoch with the lowest loss
        on them is kept. 0: the last epoch is kept.
      atomic_gradients: a GPU adds up the codebooks' gradients by atomic additions: faster, but two runs differ in their
        last bits. A CPU pays no attention.
    """

    epochs: int = 2
    batch_size: int = 1
    learning_rate: float = 0.004
    relative_rate: bool = True
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    aug_loss: bool = False
    norms: bool = True
    massive_activation_limit: float = 4.0
    compute_dtype: Dtype | None = None
    activation_dtype: Dtype = "float32"
    validation_samples: int = 0
    atomic_gradients: bool = False

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0"
        )
        _require(
            self.schedule in ("constant", "cosine", "linear"),
            "schedule",
            self.schedule,
            "'constant', 'cosine' or 'linear'",
        )
        _require_finite("warmup_fraction", self.warmup_fraction, low=0.0, high=1.0)
        _require_finite("weight_decay", self.weight_decay, low=0.0)
        if self.clip_norm is not None:
            _require(
                math.isfinite(self.clip_norm) and self.clip_norm > 0,
                "clip_norm",
                self.clip_norm,
                "above 0, or left out",
            )
        dtypes = get_args(Dtype)
        _require(
            self.compute_dtype in (None, *dtypes), "compute_dtype", self.compute_dtype, f"one of {', '.join(dtypes)}"
        )
        _require(
            self.activation_dtype in dtypes, "activation_dtype", self.activation_dtype, f"one of {', '.join(dtypes)}"
        )
        _require_finite("massive_activation_limit", self.massive_activation_limit, low=0.0)
        _require(self.validation_samples >= 0, "validation_samples", self.validation_samples, "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How texts become rows of tokens to train on.

    Attributes:
      length: tokens per row, >= 2. Running text is cut into rows, a shorter last one is dropped; a conversation has a
        row of its own, padded after its end.
      responses_only: score only what the assistant says; conversations only.
      too_long: what becomes of a conversation of more tokens: "refuse" stops before any work and names its line, "cut"
        drops the tokens past the length, "skip" leaves it out.
    """

    length: int = 512
    responses_only: bool = False
    too_long: Literal["refuse", "cut", "skip"] = "refuse"

    def __post_init__(self) -> None:
        _require(self.length >= 2, "length", self.length, "2 or more")
        _require(self.too_long in ("refuse", "cut", "skip"), "too_long", self.too_long, "'refuse', 'cut' or 'skip'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of a run are arranged. The result is the same, within rounding, on every mesh.

    The product of the sizes is the number of devices of all processes; where all are 1, one process works on its first
    device alone.

    Attributes:
      data: parts that the rows of a batch are spread over, >= 1.
      fsdp: parts that rows are spread over in addition, and that arrays are split into, >= 1; a block is gathered
        for its turn.
      tensor: parts that every large matrix is computed in, >= 1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _require(getattr(self, field.name) >= 1, f"mesh.{field.name}", getattr(self, field.name), "1 or more")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The parts along data, fsdp and tensor."""
        return self.data, self.fsdp, self.tensor

    @property
    def size(self) -> int:
        """The devices it takes."""
        return math.prod(self.sizes)

    @property
    def row_parts(self) -> int:
        """The parts that the rows of a batch are spread over."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))


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
        _require_finite("weight", self.weight, low=0.0, high=1.0)
        legal = math.isfinite(self.temperature) and self.temperature > 0
        _require(legal, "temperature", self.temperature, "above 0")


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
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(len(self.trainable) > 0, "trainable", self.trainable, "at least one regular expression")
        for pattern in self.trainable:
            _require_pattern("trainable", pattern)
        for name in ("learning_rate", "vector_lr_scale"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "above 0")
        schedules, dtypes = get_args(Schedule), get_args(Dtype)
        _require(self.schedule in schedules, "schedule", self.schedule, f"one of {', '.join(schedules)}")
        known = (None, *dtypes)
        _require(self.compute_dtype in known, "compute_dtype", self.compute_dtype, f"one of {', '.join(dtypes)}")
        _require(self.remat_policy in ("all", "cheap"), "remat_policy", self.remat_policy, "'all' or 'cheap'")
        whole = not self.offload_inputs or self.remat_policy == "all"
        _require(whole, "remat_policy", self.remat_policy, "'all' where offload_inputs is true")
        _require_finite("warmup_fraction", self.warmup_fraction, low=0.0, high=1.0)
        _require_finite("weight_decay", self.weight_decay, low=0.0)
        if self.clip_norm is not None:
            legal = math.isfinite(self.clip_norm) and self.clip_norm > 0
            _require(legal, "clip_norm", self.clip_norm, "above 0, or left out")


def compute_dtype_of(settings: BlockTuningConfig | TrainingConfig, platform: str | None = None) -> Dtype:
    """Returns the compute dtype that the settings mean.

    Args:
      settings: with or without a compute_dtype.
      platform: "gpu", "cpu" or another of JAX's; None: that of `jax.default_backend()`.
    """
    if settings.compute_dtype is not None:
        return settings.compute_dtype
    return "bfloat16" if (platform or jax.default_backend()) == "gpu" else "float32"
