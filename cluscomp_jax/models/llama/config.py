"""LlamaConfig: what distinguishes one decoder of the family from another. Knows no file format."""

import dataclasses
import importlib
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder.config import FULL, SIZES, SLIDING, check_not_negative, check_sizes, check_window
from cluscomp_jax.models.layers.rope import RopeConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape and switches of one decoder; frozen and hashable, so it serves as a static jit argument.

    Names and meanings are those of Hugging Face configs. Sizes are positive integers.

    Attributes:
      model_type: "llama" (SmolLM2 too), "mistral", "qwen2" (biases on q, k, v) or "qwen3" (norms on q, k).
      head_dim: width of one head, even; need not be hidden_size / num_attention_heads.
      hidden_act: one of ACTIVATIONS.
      sliding_window: latest positions a query of a sliding layer reads, itself included; None if no layer slides.
      layer_types: one of "full_attention", "sliding_attention" per layer; () means all full or, with a
        window, all sliding, and is filled in.
      attention_bias: biases on q, k, v and o (llama, qwen3).
      mlp_bias: biases on gate, up and down (llama).

    Invariant: len(layer_types) == num_hidden_layers; num_attention_heads % num_key_value_heads == 0.

    Raises:
      InputError: a value breaks the above.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self._check_names()
        self._check_sizes()
        if not self.layer_types:
            kind = FULL if self.sliding_window is None else SLIDING
            object.__setattr__(self, "layer_types", (kind,) * self.num_hidden_layers)
        self._check_windows()

    @classmethod
    def of(cls, config: Any) -> "LlamaConfig":
        """Returns the LlamaConfig of a config of another library.

        Args:
          config: a Hugging Face config dict, a config object of transformers (or with its `to_dict`), a ModelConfig of
            tunix or bonsai, or a config of MaxText; they are told apart by the names of their attributes.

        Raises:
          InputError: none of these, or one that asks for a computation that this family does not do.
        """
        # By name: the readers of configs import this module.
        reader = importlib.import_module("cluscomp_jax.models.llama.foreign_config")
        found: LlamaConfig = reader.read_config(config)
        return found

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before the rotation."""
        return self.model_type == "qwen3"

    def window(self, i: int) -> int | None:
        """Returns the window of layer i, None if it sees everything."""
        return self.sliding_window if self.layer_types[i] == SLIDING else None

    def _check_names(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise InputError(
                f"config: model_type {self.model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"config: hidden_act {self.hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        if self.attention_bias and self.model_type not in ("llama", "qwen3"):
            raise InputError(f"config: attention_bias is true; {self.model_type} has no such biases")
        if self.mlp_bias and self.model_type != "llama":
            raise InputError(f"config: mlp_bias is true; {self.model_type} has no such biases")

    def _check_sizes(self) -> None:
        check_sizes(self, SIZES)
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}; rotary embeddings need an even one")
        if self.rope.rope_type == "dynamic" and self.head_dim < 4:
            raise InputError(f"config: head_dim is {self.head_dim}; the dynamic rope type needs at least 4")
        check_not_negative(self, ("rms_norm_eps", "initializer_range"))

    def _check_windows(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"config: layer_types names {len(self.layer_types)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        for kind in self.layer_types:
            if kind not in (FULL, SLIDING):
                raise InputError(f"config: layer type {kind!r} is not supported; supported: {FULL}, {SLIDING}")
        if self.model_type == "llama" and self.sliding_window is not None:
            raise InputError(f"config: sliding_window is {self.sliding_window}; llama has no windows")
        if self.model_type in ("llama", "mistral") and len(set(self.layer_types)) > 1:
            raise InputError(f"config: layer_types differ; all layers of a {self.model_type} are of one type")
        if self.sliding_window is None and SLIDING in self.layer_types:
            raise InputError(f"config: layer_types names {SLIDING!r} but sliding_window is not set")
        check_window(self.sliding_window)
