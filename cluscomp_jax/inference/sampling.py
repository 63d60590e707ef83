"""How the next token is drawn from logits: settings and pure functions. Knows no model and no cache.

Letters: b batch, v vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cluscomp_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from logits; static in compiled programs.

    Attributes:
      temperature: >= 0; divides the logits. 0 takes the most likely token and ignores top_k, top_p and min_p.
      top_k: >= 1; only the k most likely tokens can be drawn. None: all.
      top_p: above 0, at most 1; only the fewest most likely tokens of at least that mass, taken after top_k, can
        be drawn (arXiv 1904.09751). None: all.
      min_p: 0 to 1; only tokens at least that share as likely as the likeliest can be drawn (arXiv 2407.01082).
        None: all.
      repetition_penalty: above 0; logits of tokens that are in the prompt or were drawn are divided by it where
        they are positive and multiplied where they are negative, before all else (arXiv 1909.05858). 1: unchanged.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be a number, 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; it must be from 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; it must be a number above 0")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Returns one token per row, int32 [b], of logits [b, v]; of equal logits the lower token ranks first.

    The repetition penalty is not in it: see `penalise`.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    ranked, tokens = jax.lax.top_k(scaled, min(sampling.top_k or scaled.shape[-1], scaled.shape[-1]))
    if sampling.top_p is not None:
        mass = jax.nn.softmax(ranked)
        before = jnp.cumsum(mass, axis=-1) - mass
        kept = (before < sampling.top_p).at[:, 0].set(True)
        ranked = jnp.where(kept, ranked, -jnp.inf)
    if sampling.min_p:
        ranked = jnp.where(ranked >= ranked[:, :1] + math.log(sampling.min_p), ranked, -jnp.inf)
    rank = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Returns logits [b, v] with those of seen tokens (bool [b, v]) made less likely, see `Sampling`."""
    lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, lowered, logits)
