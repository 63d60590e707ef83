"""The Llama family of decoders: Llama 1 to 3.3, SmolLM2, Mistral, Qwen2, Qwen3."""

from cluscomp_jax.llama.config import LlamaConfig
from cluscomp_jax.llama.hf_config import parse_config, to_hf_dict
from cluscomp_jax.llama.init import init_params
from cluscomp_jax.llama.model import LlamaModel, build, forward
from cluscomp_jax.llama.rope import RopeConfig

__all__ = ["LlamaConfig", "LlamaModel", "RopeConfig", "build", "forward", "init_params", "parse_config", "to_hf_dict"]
