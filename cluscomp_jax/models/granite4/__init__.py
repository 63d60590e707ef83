"""The dense Granite 4: Granite's block, gate and up stored as one matrix; those with Mamba or experts are refused."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import hugging_face_names
from cluscomp_jax.models.granite4.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {
    "hugging_face": hugging_face_names(
        renamed={"mlp/down_proj": "shared_mlp.output_linear"},
        fused={"shared_mlp.input_linear": ("mlp/gate_proj", "mlp/up_proj")},
    )
}
"""{form: names of its tensors}. llama.cpp's converter writes such a model as one of the architecture granite."""

__all__ = ["TENSOR_NAMES", "build", "parse_config", "to_hf_dict"]
