"""The last stage of a compression: the whole compressed model follows the original on the calibration samples."""

import dataclasses
from typing import Literal

from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.numerics import Dtype
from cluscomp_jax.config.training import EVERY_CODEBOOK, DistillationConfig, TrainingConfig
from cluscomp_jax.errors import InputError

_RATE_AT_1_BIT, _RATE_AT_4_BITS = 0.004, 0.0012


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How codebooks and norms of the whole model train together, after all blocks; indices stay as they are.

    The original and the compressed model are on the device at once. What is not named here is as in `TrainingConfig`.

    Attributes:
      steps: optimiser steps, >= 1; every step takes `batch_size` samples, in an order that the seed draws.
      trainable: as in `TrainingConfig`.
      batch_size: samples of a step, >= 1.
      learning_rate: peak learning rate of AdamW as a share of each array's root mean square, > 0. None: `rate_at` the
        bits of the compressed model.
      distillation: how far the original is followed, and how far the text.
      generated_samples: samples that the original writes, in addition to those of the calibration, of the same length,
        >= 0. They continue the beginnings of the calibration samples at temperature 1.
      save_every: steps between two saved states, >= 1; a resumed run repeats at most this many.
      compute_dtype, remat_policy, offload_inputs: as in `TrainingConfig`.
    """

    steps: int = 100
    trainable: tuple[str, ...] = (EVERY_CODEBOOK, ".*norm/weight")
    batch_size: int = 1
    learning_rate: float | None = None
    distillation: DistillationConfig = DistillationConfig()
    generated_samples: int = 64
    save_every: int = 32
    compute_dtype: Dtype | None = None
    remat_policy: Literal["all", "cheap"] = "cheap"
    offload_inputs: bool = False

    def __post_init__(self) -> None:
        self.finetune_config()
        if self.generated_samples < 0:
            raise InputError(f"recovery: generated_samples is {self.generated_samples}; it must be 0 or more")

    def finetune_config(self, mesh: MeshConfig = MeshConfig(), *, bits: float = 4.0) -> FinetuneConfig:
        """Returns the finetuning run that this is, without model and seed.

        Args:
          mesh: of the run.
          bits: stored bits per weight of the compressed model, > 0.

        Raises:
          InputError: a value out of its range, or a batch that the mesh does not divide.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["save_every"], fields["generated_samples"]
        if self.learning_rate is None:
            fields["learning_rate"] = rate_at(bits)
        try:
            training = TrainingConfig(**fields)
            return FinetuneConfig(training=training, save_every=self.save_every, mesh=mesh)
        except InputError as error:
            raise InputError(f"recovery: {error}") from error


def rate_at(bits: float) -> float:
    """Returns the relative learning rate that suits a model of so many stored bits per weight.

    0.004 at 1 bit and below, 0.0012 at 4 bits and above, and between them a constant factor for every bit: the coarser
    the codes, the further codebooks have to move (docs/experiments.md, "The rate of recovery").
    """
    share = min(max((4.0 - bits) / 3.0, 0.0), 1.0)
    return _RATE_AT_4_BITS * (_RATE_AT_1_BIT / _RATE_AT_4_BITS) ** share
