"""OPT and Galactica: LayerNorm, learned positions, an MLP without a gate, biases. llama.cpp has no such files."""

import dataclasses

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import hugging_face_names
from cluscomp_jax.models.opt.hf_config import parse_config, to_hf_dict

_NAMES = hugging_face_names(
    renamed={
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "self_attn/o_proj": "self_attn.out_proj",
        "mlp/up_proj": "fc1",
        "mlp/down_proj": "fc2",
    }
)
TENSOR_NAMES = {
    "hugging_face": dataclasses.replace(
        _NAMES,
        block_prefix="model.decoder.layers.",
        outer={
            "model/embed_tokens": ("model.decoder.embed_tokens", "embedding"),
            "model/embed_positions": ("model.decoder.embed_positions", "embedding"),
            "model/project_in": ("model.decoder.project_in", "kernel"),
            "model/project_out": ("model.decoder.project_out", "kernel"),
            "model/norm": ("model.decoder.final_layer_norm", "weight"),
            "lm_head": ("lm_head", "kernel"),
        },
    )
}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "parse_config", "to_hf_dict"]
