"""OLMo 2 and OLMo 3: norms after attention and MLP only, and over all of q and of k; windows in OLMo 3."""

from cluscomp_jax.models.decoder.model import build
from cluscomp_jax.models.decoder.names import HUGGING_FACE, gguf_names
from cluscomp_jax.models.olmo.gguf_config import gguf_fields
from cluscomp_jax.models.olmo.hf_config import parse_config, to_hf_dict

TENSOR_NAMES = {"hugging_face": HUGGING_FACE, "gguf": gguf_names("post")}
"""{form: names of its tensors}."""

__all__ = ["TENSOR_NAMES", "build", "gguf_fields", "parse_config", "to_hf_dict"]
