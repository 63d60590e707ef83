"""Phi-3 and Phi-4: Llama's block, q, k, v and gate, up stored as one matrix each, LongRoPE on a part of the head."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import hugging_face_names
from cluscomp_jax.models.phi3.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {
    "hugging_face": hugging_face_names(
        fused={
            "self_attn.qkv_proj": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
            "mlp.gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
        }
    )
}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "parse_config", "to_hf_dict"]
