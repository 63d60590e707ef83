"""The decoder that all families share: one record of switches, one block, and what reads and names its parameters."""

from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.decoder.forward_pass import forward
from cluscomp_jax.models.decoder.model import DecoderModel, build

__all__ = ["DecoderConfig", "DecoderModel", "LayerKind", "build", "forward"]
