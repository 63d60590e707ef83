"""Block-wise error minimisation."""

import dataclasses
import math
from typing import get_args

from cluscomp_jax.config.checks import require, require_finite
from cluscomp_jax.config.numerics import Dtype, Schedule


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
      massive_activation_limit: a position whose target has more than this many times the median mean square weighs in
        proportion less in the loss, >= 0; 0: all weigh the same.
      norms: train the block's one-dimensional parameters too (norm weights, biases), at a tenth of the rate; they are
        then stored in the dtype of codebooks.
      compute_dtype: dtype of activations and decoded weights; masters and Adam's moments stay float32. None: bfloat16
        on a GPU, whose float32 products take eight times as long; float32 elsewhere (`compute_dtype_of`).
      activation_dtype: dtype of the stored activation streams.
      validation_samples: how many of the last samples are kept out of tuning and of Hessians and scored after each
        epoch, >= 0; the epoch with the lowest loss on them is kept. 0: the last epoch is kept.
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
    norms: bool = True
    massive_activation_limit: float = 4.0
    compute_dtype: Dtype | None = None
    activation_dtype: Dtype = "float32"
    validation_samples: int = 0
    atomic_gradients: bool = False

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0"
        )
        require(
            self.schedule in ("constant", "cosine", "linear"),
            "schedule",
            self.schedule,
            "'constant', 'cosine' or 'linear'",
        )
        require_finite("warmup_fraction", self.warmup_fraction, low=0.0, high=1.0)
        require_finite("weight_decay", self.weight_decay, low=0.0)
        if self.clip_norm is not None:
            require(
                math.isfinite(self.clip_norm) and self.clip_norm > 0,
                "clip_norm",
                self.clip_norm,
                "above 0, or left out",
            )
        dtypes = get_args(Dtype)
        require(
            self.compute_dtype in (None, *dtypes), "compute_dtype", self.compute_dtype, f"one of {', '.join(dtypes)}"
        )
        require(
            self.activation_dtype in dtypes, "activation_dtype", self.activation_dtype, f"one of {', '.join(dtypes)}"
        )
        require_finite("massive_activation_limit", self.massive_activation_limit, low=0.0)
        require(self.validation_samples >= 0, "validation_samples", self.validation_samples, "0 or more")
