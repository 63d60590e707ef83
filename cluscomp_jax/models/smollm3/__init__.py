"""SmolLM3: Llama's block; layers without a rotary embedding, and windows in them where the config says so."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE, gguf_names
from cluscomp_jax.models.smollm3.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {"hugging_face": HUGGING_FACE, "gguf": gguf_names(interleaved=("smollm3",))}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "parse_config", "to_hf_dict"]
