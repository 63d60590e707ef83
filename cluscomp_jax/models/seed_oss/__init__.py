"""Seed-OSS: Llama's block with biases by flags, that of o apart from those of q, k and v."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE
from cluscomp_jax.models.seed_oss.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {"hugging_face": HUGGING_FACE}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "parse_config", "to_hf_dict"]
