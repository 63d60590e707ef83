"""Dtypes and schedules that the settings of tuning and of training have in common."""

from typing import Literal, Protocol

import jax

Dtype = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["constant", "cosine", "linear"]


class HasComputeDtype(Protocol):
    """Settings with a compute dtype."""

    @property
    def compute_dtype(self) -> Dtype | None:
        """None: as `compute_dtype_of` says."""
        ...


def compute_dtype_of(settings: HasComputeDtype, platform: str | None = None) -> Dtype:
    """Returns the compute dtype that the settings mean.

    Args:
      settings: with or without a compute_dtype.
      platform: "gpu", "cpu" or another of JAX's; None: that of `jax.default_backend()`.
    """
    if settings.compute_dtype is not None:
        return settings.compute_dtype
    return "bfloat16" if (platform or jax.default_backend()) == "gpu" else "float32"
