"""DecoderConfig: the sizes and switches of one decoder, whatever its family. Knows no file format.

A family reads its config.json into one of these. What the switches do is in `models/decoder/model.py`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal, get_args

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder.experts import ExpertsConfig
from cluscomp_jax.models.layers.norms import NormWeight
from cluscomp_jax.models.layers.rope import LongRopeConfig, RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
"""The layer types of config.json."""
MAX_LAYERS = 4096
MAX_EXPERTS = 2**17
"""Of all layers together: each has parameters of its own, which a damaged config must not fill the memory with."""
MAX_SIZE = 2**31 - 1
SIZES = {
    "num_hidden_layers": MAX_LAYERS,
    "vocab_size": MAX_SIZE,
    "hidden_size": MAX_SIZE,
    "intermediate_size": MAX_SIZE,
    "num_attention_heads": MAX_SIZE,
    "num_key_value_heads": MAX_SIZE,
    "head_dim": MAX_SIZE,
    "max_position_embeddings": MAX_SIZE,
}
"""{size that every config has: its limit}."""
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
Norms = Literal["pre", "post", "sandwich", "after_sum"]
NormKind = Literal["rms", "layer", "bare_layer"]
QkNorm = Literal["none", "head", "projection"]


def _within(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def check_sizes(config: object, limits: Mapping[str, int]) -> None:
    """Raises InputError unless the sizes of a config are integers from 1 to their limits and its heads form groups."""
    for name, limit in limits.items():
        value = getattr(config, name)
        if not _within(value, limit):
            raise InputError(f"config: {name} is {value!r}; it must be an integer from 1 to {limit}")
    heads, pairs = (getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads % pairs:
        raise InputError(
            f"config: num_attention_heads is {heads} and num_key_value_heads {pairs}; the first must be a multiple of "
            "the second"
        )


def check_not_negative(config: object, names: Iterable[str]) -> None:
    """Raises InputError unless these numbers of a config are finite and at least 0."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"config: {name} is {value}; it must be a finite number, at least 0")


def check_window(window: object) -> None:
    """Raises InputError unless an attention window is an integer from 1, or None for all positions."""
    if window is not None and not _within(window, MAX_SIZE):
        raise InputError(f"config: sliding_window is {window!r}; it must be an integer from 1 to {MAX_SIZE}, or null")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What distinguishes the program of one block from that of another with the same shapes; hashable.

    Attributes:
      window: latest positions that a query reads, itself included, at least 1; None: all.
      rope: the rotary embedding of queries and keys; None: they are not rotated.
    """

    window: int | None = None
    rope: RopeConfig | None = None

    def __post_init__(self) -> None:
        check_window(self.window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes and switches of one decoder; frozen and hashable, so it serves as a static jit argument.

    Sizes are positive integers, named as in Hugging Face configs. The defaults of the switches are those of Llama.

    Attributes:
      model_type: the family that the config belongs to, as in `cluscomp_jax.models.model.register_family`.
      head_dim: width of one head; need not be hidden_size / num_attention_heads.
      layers: the kind of each layer, num_hidden_layers of them.
      norms: "pre": a norm before attention and one before the MLP; "post": one after each, before the sum; "sandwich":
        both; "after_sum": one after each sum.
      norm: "rms": RMSNorm; "layer": LayerNorm with weight and bias; "bare_layer": LayerNorm without parameters.
      norm_weight: how an RMSNorm multiplies by its weight, see `NormWeight`.
      rms_norm_eps: of all norms, finite, at least 0.
      qk_norm: norms on queries and keys before the rotation: "none", over each "head", or over the whole "projection".
      qkv_bias, o_bias, mlp_bias: biases on q, k and v; on o; on the projections of the MLP.
      gated_mlp: whether the MLP has a gate; without one the activation is that of up.
      hidden_act: one of ACTIVATIONS, of the gate.
      experts: those of every layer, each an MLP of intermediate_size; None: one MLP.
      rotary_dim: how many channels of a head rotate, from the first, even; None: all.
      attention_scale: of the scores, above 0; None: 1 / sqrt(head_dim).
      attention_softcap, logits_softcap: c above 0: values x become c tanh(x / c); None: they stay.
      query_scale_beta, query_scale_period: rotated queries at position p are multiplied by
        1 + beta ln(1 + floor(p / period)) (Llama 4's temperature); beta 0: they stay.
      embedding_multiplier, residual_multiplier, logits_divisor: embeddings and what is added to the residual are
        multiplied, logits divided.
      position_offset: rows of the table of learned positions before that of position 0; the table has
        max_position_embeddings more. None: no learned positions.
      embedding_size: width of token embeddings that are projected to hidden_size, and to which the head's input is
        projected; None: they have hidden_size, and nothing is projected.
      final_norm: whether a norm comes before the head.
      initializer_range: deviation of random matrices.
      extra: (name, value) of fields of config.json that no switch holds and that an export gives back.

    Invariant: num_attention_heads % num_key_value_heads == 0; the rotary channels are even and within the head.

    Raises:
      InputError: a value breaks the above.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    layers: tuple[LayerKind, ...]
    norms: Norms = "pre"
    norm: NormKind = "rms"
    norm_weight: NormWeight = "cast"
    rms_norm_eps: float = 1e-6
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    hidden_act: str = "silu"
    experts: ExpertsConfig | None = None
    rotary_dim: int | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    query_scale_beta: float = 0.0
    query_scale_period: int = 1
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    position_offset: int | None = None
    embedding_size: int | None = None
    final_norm: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    extra: tuple[tuple[str, str | int | float | bool | None], ...] = ()

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_names()
        self._check_numbers()
        self._check_rotation()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: as a static argument the config is hashed at every call, and its layers are many."""
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @property
    def rotated(self) -> int:
        """How many channels of a head rotate."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def window(self, i: int) -> int | None:
        """Returns the window of layer i, None if it sees everything."""
        return self.layers[i].window

    def _check_sizes(self) -> None:
        own = SIZES | {"query_scale_period": MAX_SIZE}
        check_sizes(self, own if self.embedding_size is None else own | {"embedding_size": MAX_SIZE})
        experts = 0 if self.experts is None else self.experts.count * self.num_hidden_layers
        if experts > MAX_EXPERTS:
            raise InputError(f"config: all layers together have {experts} experts; at most {MAX_EXPERTS} are served")
        if len(self.layers) != self.num_hidden_layers:
            raise InputError(
                f"config: there are {len(self.layers)} kinds of layers, num_hidden_layers is {self.num_hidden_layers}"
            )

    def _check_names(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"config: {name} is {getattr(self, name)!r}, which is not supported; supported: "
                    f"{', '.join(allowed)}"
                )
        if self.norm != "rms" and self.qk_norm != "none":
            raise InputError(f"config: norm is {self.norm!r} and qk_norm {self.qk_norm!r}; norms on q and k are 'rms'")

    def _check_numbers(self) -> None:
        check_not_negative(self, ("rms_norm_eps", "initializer_range", "query_scale_beta"))
        if self.position_offset is not None:
            check_not_negative(self, ("position_offset",))
        for name in ("attention_scale", "attention_softcap", "logits_softcap", *_MULTIPLIERS):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"config: {name} is {value}; it must be a finite number above 0")

    def _check_rotation(self) -> None:
        for rope in {kind.rope for kind in self.layers if kind.rope is not None}:
            if self.rotated % 2 or not 2 <= self.rotated <= self.head_dim:
                raise InputError(
                    f"config: {self.rotated} of the {self.head_dim} channels of a head rotate; it must be an even "
                    "number from 2 to all"
                )
            if rope.rope_type == "dynamic" and self.rotated < 4:
                raise InputError(f"config: {self.rotated} channels rotate; the dynamic rope type needs at least 4")
            if isinstance(rope, LongRopeConfig):
                rope.check_pairs(self.rotated // 2)


_CHOICES = {
    "hidden_act": ACTIVATIONS,
    "norm": get_args(NormKind),
    "norms": get_args(Norms),
    "norm_weight": get_args(NormWeight),
    "qk_norm": get_args(QkNorm),
}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_divisor")
