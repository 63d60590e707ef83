"""Phi-3 and Phi-4: Llama's block, q, k, v and gate, up stored as one matrix each, LongRoPE on a part of the head."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import gguf_names, hugging_face_names
from cluscomp_jax.models.phi3.gguf_config import LONG, SHORT, gguf_fields
from cluscomp_jax.models.phi3.hf_config import parse_config, to_hf_dict

_QKV = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
_GATE_UP = ("mlp/gate_proj", "mlp/up_proj")

TENSOR_NAMES = {
    "hugging_face": hugging_face_names(fused={"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP}),
    "gguf": gguf_names(fused={"attn_qkv": _QKV, "ffn_up": _GATE_UP}, config_tensors=(LONG, SHORT)),
}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
