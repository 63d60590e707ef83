"""Ministral 3 (text): Mistral's block with YaRN, and queries that grow with their position."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE, gguf_names
from cluscomp_jax.models.ministral3.gguf_config import gguf_fields
from cluscomp_jax.models.ministral3.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {"hugging_face": HUGGING_FACE, "gguf": gguf_names(interleaved=("ministral3",))}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
