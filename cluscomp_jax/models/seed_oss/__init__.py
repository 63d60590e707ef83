"""Seed-OSS: Llama's block with biases by flags, that of o apart from those of q, k and v."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE, gguf_names
from cluscomp_jax.models.seed_oss.gguf_config import gguf_fields
from cluscomp_jax.models.seed_oss.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {
    "hugging_face": HUGGING_FACE,
    "gguf": gguf_names(renamed={"post_attention_layernorm": "post_attention_norm"}),
}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
