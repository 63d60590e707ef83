"""Granite 3 and the dense Granite 4: Llama's block with four multipliers."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE, gguf_names
from cluscomp_jax.models.granite.gguf_config import gguf_fields
from cluscomp_jax.models.granite.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {"hugging_face": HUGGING_FACE, "gguf": gguf_names(interleaved=("granite",))}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
