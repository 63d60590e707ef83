"""Ministral 3 (text): Mistral's block with YaRN, and queries that grow with their position."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE
from cluscomp_jax.models.ministral3.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {"hugging_face": HUGGING_FACE}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "parse_config", "to_hf_dict"]
