"""The Llama family of decoders: Llama 1 to 3.3, SmolLM2, Mistral, Qwen2, Qwen3."""

from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.models.llama.config import LlamaConfig
from cluscomp_jax.models.llama.hf_config import parse_config, to_hf_dict
from cluscomp_jax.models.llama.init import init_params
from cluscomp_jax.models.llama.model import LlamaModel, build, forward
from cluscomp_jax.models.llama.names import TENSOR_NAMES

__all__ = [
    "TENSOR_NAMES",
    "LlamaConfig",
    "LlamaModel",
    "RopeConfig",
    "build",
    "forward",
    "init_params",
    "parse_config",
    "to_hf_dict",
]
