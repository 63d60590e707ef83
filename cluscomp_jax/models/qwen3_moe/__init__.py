"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import gguf_names, hugging_face_names
from cluscomp_jax.models.qwen3_moe.gguf_config import gguf_fields
from cluscomp_jax.models.qwen3_moe.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {
    "hugging_face": hugging_face_names(experts=("mlp", ("gate_proj", "up_proj", "down_proj"))),
    "gguf": gguf_names(experts=True),
}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
