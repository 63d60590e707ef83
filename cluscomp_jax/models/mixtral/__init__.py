"""Mixtral: Mistral with a mixture of experts in every layer."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import gguf_names, hugging_face_names
from cluscomp_jax.models.mixtral.gguf_config import gguf_fields
from cluscomp_jax.models.mixtral.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {
    "hugging_face": hugging_face_names(experts=("block_sparse_moe", ("w1", "w3", "w2"))),
    "gguf": gguf_names(interleaved=("mixtral",), experts=True),
}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
