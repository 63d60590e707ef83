"""Samples of a forward pass: by tokens, or as many as a budget of device memory allows."""

from cluscomp_jax.config import RunConfig

_FORWARD_TOKENS = 2048
"""Tokens per batch where nothing is differentiated."""


def forward_batch(cfg: RunConfig) -> int:
    """Returns the samples that pass through a block together."""
    return max(1, _FORWARD_TOKENS // cfg.calibration.length)
