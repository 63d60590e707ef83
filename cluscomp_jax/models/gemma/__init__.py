"""Gemma 2, and Gemma 3 as text model: sandwich norms by 1 + w, scaled embeddings, two rotary bases in Gemma 3."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE, gguf_names
from cluscomp_jax.models.gemma.gguf_config import gguf_fields
from cluscomp_jax.models.gemma.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {"hugging_face": HUGGING_FACE, "gguf": gguf_names("sandwich")}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
