"""What a run needs apart from the device: memory of the host and room on the disk, added up from shapes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering import sensitivity
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.models.model import Model, width
from cluscomp_jax.plan.setting import STORED, BlockSpec
from cluscomp_jax.plan.shapes import AbstractDevice, nbytes

_PROCESS_BYTES = 1_500_000_000
"""Python, JAX, XLA's programs: a round number above what runs of small models take."""
_BLOCKS_AT_ONCE = 4
"""Dense blocks in memory: the one at work, a kernel's copies, the next one and the last one's outputs."""


@dataclasses.dataclass(frozen=True)
class HostRequirements:
    """Bytes that are not on the device.

    Attributes:
      host_bytes: memory of the host while a model is compressed, whatever the number of blocks; what it maps of
        activations comes on top, and the kernel takes that back when it must.
      scratch_bytes: activation streams in the work folder, gone afterwards.
      checkpoint_bytes: the result.
      finetune_host_bytes: memory of the host while the result is finetuned, saved states left out.
    """

    host_bytes: int
    scratch_bytes: int
    checkpoint_bytes: int
    finetune_host_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the bytes as plain JSON values."""
        return dataclasses.asdict(self)


def host_needs(
    model: Model, cfg: CompressConfig, settings: list[BlockSpec], finetune: FinetuneConfig
) -> HostRequirements:
    """Returns what a run of `cfg` on a GPU, and the finetuning of its result, need of their host."""
    outer = nbytes(AbstractDevice().tree(model.outer_shapes(), STORED))
    checkpoint = outer + sum(setting.blocks * nbytes(setting.compressed()) for setting in settings)
    largest = max(
        setting.blocks * nbytes(leaf) for setting in settings for leaf in jax.tree.leaves(setting.compressed())
    )
    return HostRequirements(
        host_bytes=_PROCESS_BYTES + max(*(_clustering_bytes(setting) for setting in settings), 2 * outer),
        scratch_bytes=scratch_bytes(model, cfg, (cfg.calibration.samples, cfg.calibration.length)),
        checkpoint_bytes=checkpoint,
        # The compressed model is read whole, and stacked for the device array by array.
        finetune_host_bytes=_PROCESS_BYTES + max(checkpoint + largest, _offloaded_bytes(model, finetune)),
    )


def _clustering_bytes(setting: BlockSpec) -> int:
    """Returns what waits on the host while a block is clustered, and at least `_BLOCKS_AT_ONCE` blocks.

    With feedback that is the block as it was and as it is by now, and of the largest site the root and its kernels
    corrected to float32. The vectors of kernels that share a codebook are joined there, float32.
    """
    block = nbytes(setting.dense())
    joined = max((8 * sum(math.prod(setting.shapes[p]) for p in group) for group in setting.sharing), default=0)
    if not setting.cfg.cluster.error_feedback:
        return max(_BLOCKS_AT_ONCE * block, 2 * block + joined)
    input_groups = []
    for paths in setting.model.input_groups.values():
        shapes = [setting.shapes[path] for path in paths if path in setting.rules]
        input_groups += [4 * (shapes[0][0] ** 2 + sum(map(math.prod, shapes)))] if shapes else []
    return max(_BLOCKS_AT_ONCE * block, 2 * block + max(joined, *input_groups))


def _offloaded_bytes(model: Model, finetune: FinetuneConfig) -> int:
    """Returns what `offload_inputs` has in pinned memory: the inputs of all blocks in one pass."""
    training = finetune.training
    rows = training.batch_size * finetune.data.length if training.offload_inputs else 0
    return model.num_blocks * rows * width(model) * np.dtype(jnp.dtype(compute_dtype_of(training))).itemsize


def scratch_bytes(model: Model, cfg: CompressConfig, shape: tuple[int, ...]) -> int:
    """Returns the most bytes of activations that a run on calibration tokens [samples, length] has on the disk."""
    dtype = np.dtype(jnp.dtype((cfg.tuning or BlockTuningConfig()).activation_dtype))
    during = len(cfg.activation_stores) * math.prod(shape) * width(model) * dtype.itemsize
    before = sensitivity.scratch_bytes(model.num_blocks, shape, width(model)) if cfg.cluster.uneven else 0
    return max(before, during)
