"""What a run needs beside the device: memory of the host and room on the disk, added up from shapes."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from cluscomp_jax.config import RunConfig
from cluscomp_jax.model import Model
from cluscomp_jax.plan.setting import STORED, Setting, width
from cluscomp_jax.plan.shapes import Place, nbytes
from cluscomp_jax.settings import TuningSettings

_PROCESS_BYTES = 1_500_000_000
"""Python, JAX, XLA's programs: a round number above what runs of small models take."""
_BLOCKS_AT_ONCE = 4
"""Dense blocks in memory: the one at work, a kernel's copies, the next one and the last one's outputs."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes beside the device.

    Attributes:
      host_bytes: memory of the host, whatever the number of blocks; what it maps of activations comes on top, and the
        kernel takes that back when it must.
      scratch_bytes: activation streams in the work folder, gone afterwards.
      checkpoint_bytes: the result.
    """

    host_bytes: int
    scratch_bytes: int
    checkpoint_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the bytes as plain JSON values."""
        return dataclasses.asdict(self)


def host_needs(model: Model, cfg: RunConfig, settings: list[Setting]) -> Needs:
    """Returns what a run of `cfg` on a GPU needs of its host."""
    rest = nbytes(Place().tree(model.rest_shapes(), STORED))
    block = max(nbytes(setting.dense()) for setting in settings)
    compressed = sum(setting.blocks * nbytes(setting.compressed()) for setting in settings)
    return Needs(
        host_bytes=_PROCESS_BYTES + max(_BLOCKS_AT_ONCE * block, 2 * rest),
        scratch_bytes=scratch_bytes(model, cfg, (cfg.calibration.samples, cfg.calibration.length)),
        checkpoint_bytes=compressed + rest,
    )


def scratch_bytes(model: Model, cfg: RunConfig, shape: tuple[int, ...]) -> int:
    """Returns the bytes of the activation streams of a run on calibration tokens [samples, length]."""
    streams = 1 if cfg.cluster.calibrated or cfg.tuning else 0
    if cfg.tuning or cfg.cluster.corrects:
        streams += 1
    if cfg.tuning and cfg.tuning.aug_loss:
        streams += 1
    dtype = np.dtype(jnp.dtype((cfg.tuning or TuningSettings()).activation_dtype))
    return streams * math.prod(shape) * width(model) * dtype.itemsize
