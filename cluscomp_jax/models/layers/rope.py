"""Rotary position embeddings: inverse frequencies of every served type, their tables, the rotation.

Knows nothing of attention or of config files: a RopeConfig comes in with every default already filled in.
Letters: b batch, t time, h head_dim.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.errors import InputError

ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which rotary embedding, and its numbers. Fields a type does not use keep their defaults.

    Attributes:
      rope_type: one of ROPE_TYPES.
      theta: the base of the geometric series of wavelengths, > 1.
      factor: context extension, > 0 (linear, dynamic, llama3, yarn).
      original_max_positions: context length of the pretraining, in tokens (dynamic, llama3, yarn).
      low_freq_factor, high_freq_factor: wavelengths above original/low are stretched by `factor`, below
        original/high left alone (llama3); low < high.
      beta_fast, beta_slow: rotations over the original context between which yarn blends (yarn).
      attention_factor: cosine and sine are multiplied by it (yarn).
      truncate: whether yarn rounds the ends of its blend to whole dimensions.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        self._check_type()
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"config: rope {name} is {value}; it must be a finite number above 0")
        if self.theta <= 1:
            raise InputError(f"config: rope_theta is {self.theta}; it must be above 1")
        if not (math.isfinite(self.attention_factor) and self.attention_factor > 0):
            raise InputError(f"config: rope attention_factor is {self.attention_factor}; it must be above 0")
        if self.rope_type in ("dynamic", "llama3", "yarn") and self.original_max_positions < 1:
            raise InputError(
                f"config: rope type {self.rope_type!r} needs original_max_position_embeddings of at least 1, "
                f"not {self.original_max_positions}"
            )
        if self.rope_type == "dynamic" and self.factor < 1:
            raise InputError(f"config: rope factor is {self.factor}; the dynamic type needs at least 1")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"config: rope low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "the first must be the smaller"
            )

    def _check_type(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise InputError(
                f"config: rope type {self.rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeConfig(RopeConfig):
    """A rotary embedding whose wavelengths are stretched one by one (LongRoPE, arXiv 2402.13753).

    A class of its own, so that the other types keep the fields that they have in records of earlier runs.

    Attributes:
      short_factor: by what the wavelength of each pair is multiplied up to `original_max_positions` tokens.
      long_factor: the same for longer sequences.

    Invariant: both have one positive number for each pair of rotated channels; original_max_positions >= 1.
    """

    rope_type: str = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]

    def _check_type(self) -> None:
        if self.rope_type != "longrope":
            raise InputError(f"config: rope type {self.rope_type!r} reads no short_factor; only longrope does")
        if self.original_max_positions < 1:
            raise InputError(
                f"config: rope type 'longrope' needs original_max_position_embeddings of at least 1, not "
                f"{self.original_max_positions}"
            )
        for name in ("short_factor", "long_factor"):
            if not all(math.isfinite(value) and value > 0 for value in getattr(self, name)):
                raise InputError(f"config: rope {name} has numbers that are not finite and above 0")

    def check_pairs(self, pairs: int) -> None:
        """Raises InputError unless there is a factor for each of `pairs` rotated pairs of channels."""
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != pairs:
                raise InputError(
                    f"config: rope {name} has {len(getattr(self, name))} numbers; {pairs} pairs of channels rotate"
                )


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Returns the default attention factor of YaRN: 0.1 ln(factor) + 1, or the ratio of two such scales.

    Source: arXiv 2309.00071, equation 22; the ratio is DeepSeek's use of it.
    """

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def longrope_attention_factor(factor: float, original_max_positions: int) -> float:
    """Returns the default attention factor of LongRoPE: sqrt(1 + ln(factor) / ln(original context)), at least 1.

    Source: arXiv 2402.13753, section 3.2, as transformers applies it; an original context of 1 gives 1.
    """
    if factor <= 1 or original_max_positions <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_positions))


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: Any) -> Any:
    """Returns the angle per position of each pair of channels, float32 [head_dim / 2], in radians.

    Args:
      rope: the type and its numbers.
      head_dim: even, at least 2 (4 for the dynamic type).
      length: tokens of the whole sequence so far, int or traced scalar; dynamic and longrope read it.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    if isinstance(rope, LongRopeConfig):
        return _longrope(rope, exponents, length)
    if rope.rope_type == "dynamic":
        return _dynamic(rope, head_dim, exponents, length)
    plain: Any = rope.theta**-exponents
    if rope.rope_type == "linear":
        plain = plain / rope.factor
    elif rope.rope_type == "llama3":
        plain = _llama3(rope, plain)
    elif rope.rope_type == "yarn":
        plain = _yarn(rope, head_dim, plain)
    return plain.astype(np.float32)


def _dynamic(rope: RopeConfig, head_dim: int, exponents: np.ndarray, length: Any) -> jax.Array:
    """The base grows with the length beyond the original context (dynamic NTK)."""
    stretch = jnp.maximum(jnp.asarray(length, jnp.float32) / rope.original_max_positions, 1.0)
    growth = (rope.factor * stretch - (rope.factor - 1.0)) ** (head_dim / (head_dim - 2))
    return (rope.theta * growth) ** jnp.asarray(-exponents, jnp.float32)


def _longrope(rope: LongRopeConfig, exponents: np.ndarray, length: Any) -> jax.Array:
    """Wavelengths times the short factors, beyond the original context times the long ones."""
    plain = rope.theta**-exponents
    short, long = ((plain / np.asarray(each)).astype(np.float32) for each in (rope.short_factor, rope.long_factor))
    return jnp.where(jnp.asarray(length) > rope.original_max_positions, long, short)


def _llama3(rope: RopeConfig, plain: Any) -> Any:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (Llama 3.1)."""
    rotations = rope.original_max_positions * plain / (2 * math.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: RopeConfig, head_dim: int, plain: Any) -> Any:
    """Pairs are blended from kept to stretched along a ramp over their number (arXiv 2309.00071, section 3.2)."""

    def pair_that_turns(rotations: float) -> float:
        original = rope.original_max_positions
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: jax.Array, length: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns (cosine, sine), each [t, head_dim / 2] of `dtype`, of int positions [t] among `length` tokens."""
    frequencies = inverse_frequencies(rope, head_dim, length)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    factor = rope.attention_factor
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array], *, neighbours: bool = False) -> jax.Array:
    """Returns x [b, t, heads, h] with the channels of each pair turned together by their angle.

    Channels after those that the tables are made for stay as they are (partial rotary embeddings).

    Args:
      x: queries or keys.
      tables: of `rotary_tables`.
      neighbours: whether pair c is (2c, 2c + 1), as in MaxText's Llama 3.1; else it is (c, c + h/2), the half-split
        layout.
    """
    cosine, sine = (table[:, None, :] for table in tables)
    turning = 2 * cosine.shape[-1]
    if turning < x.shape[-1]:
        turned_part = rotate(x[..., :turning], tables, neighbours=neighbours)
        return jnp.concatenate([turned_part, x[..., turning:]], axis=-1)
    first, second = (x[..., ::2], x[..., 1::2]) if neighbours else jnp.split(x, 2, axis=-1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    return jnp.stack(turned, axis=-1).reshape(x.shape) if neighbours else jnp.concatenate(turned, axis=-1)
