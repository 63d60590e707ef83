"""The last stage of a compression: the whole compressed model follows the original on the calibration samples."""

import dataclasses
from typing import Literal

from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.numerics import Dtype
from cluscomp_jax.config.training import EVERY_CODEBOOK, DistillationConfig, TrainingConfig
from cluscomp_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How codebooks and norms of the whole model train together, after all blocks; indices stay as they are.

    The original and the compressed model are on the device at once. What is not named here is as in `TrainingConfig`.

    Attributes:
      steps: optimiser steps, >= 1; every step takes `batch_size` samples, in an order that the seed draws.
      trainable: as in `TrainingConfig`.
      batch_size: samples of a step, >= 1.
      learning_rate: peak learning rate of AdamW as a share of each array's root mean square, > 0.
      distillation: how far the original is followed, and how far the text.
      save_every: steps between two saved states, >= 1; a resumed run repeats at most this many.
      compute_dtype, remat_policy, offload_inputs: as in `TrainingConfig`.
    """

    steps: int = 100
    trainable: tuple[str, ...] = (EVERY_CODEBOOK, ".*norm/weight")
    batch_size: int = 1
    learning_rate: float = 0.0012
    distillation: DistillationConfig = DistillationConfig()
    save_every: int = 32
    compute_dtype: Dtype | None = None
    remat_policy: Literal["all", "cheap"] = "cheap"
    offload_inputs: bool = False

    def __post_init__(self) -> None:
        self.finetune_config()

    def finetune_config(self, mesh: MeshConfig = MeshConfig()) -> FinetuneConfig:
        """Returns the finetuning run that this is, without model and seed.

        Raises:
          InputError: a value out of its range, or a batch that the mesh does not divide.
        """
        names = [field.name for field in dataclasses.fields(self) if field.name != "save_every"]
        try:
            training = TrainingConfig(**{name: getattr(self, name) for name in names})
            return FinetuneConfig(training=training, save_every=self.save_every, mesh=mesh)
        except InputError as error:
            raise InputError(f"recovery: {error}") from error
