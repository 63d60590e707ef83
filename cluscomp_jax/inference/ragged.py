"""Steps of cached decoding for a batch whose rows are at different positions. Knows a Model, no parameters' source.

A Model's cached block takes one position for the whole batch; here it is mapped over rows, which leaves each matrix
product one product of the batch. Letters: b batch, t time, d model width, v vocabulary.
"""

from collections.abc import Hashable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core.trees import Params
from cluscomp_jax.inference.sampling import Sampling, penalise, sample
from cluscomp_jax.models.model import Cache, Model


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def cached_rows(
    model: Model,
    layer_type: Hashable,
    params: Params,
    x: jax.Array,
    cache: Cache,
    positions: jax.Array | None,
    lengths: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns (y [b, t, d], new cache) of x [b, t, d], row i at positions[i] … of a sequence of lengths[i] so far.

    `positions` None: all at the beginning, which a program of its own serves faster.
    """

    def row(x: jax.Array, cache: Cache, position: jax.Array | None, length: jax.Array) -> tuple[jax.Array, Cache]:
        single = jax.tree.map(lambda leaf: leaf[None], cache)
        begin = 0 if position is None else position
        y, written = model.cached_block(params, x[None], single, begin, layer_type=layer_type, length=length)
        return y[0], jax.tree.map(lambda leaf: leaf[0], written)

    y, written = jax.vmap(row)(x, cache, positions, lengths)
    return y, written


@jax.jit
def gather_last(last: jax.Array, x: jax.Array, at: jax.Array) -> jax.Array:
    """Returns [b, 1, d]: column at[i] of row i of x [b, t, d] where x has that column, else row i of `last`."""
    inside = (at >= 0) & (at < x.shape[1])
    taken = jnp.take_along_axis(x, jnp.clip(at, 0, x.shape[1] - 1)[:, None, None], axis=1)
    return jnp.where(inside[:, None, None], taken, last)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def next_unseen(
    model: Model, sampling: Sampling, outer: Params, last: jax.Array, step: jax.Array, key: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (tokens int32 [b], `seen` with them), drawn from last [b, 1, d] under the repetition penalty."""
    logits = penalise(model.head(outer, last)[:, 0], seen, sampling.repetition_penalty)
    tokens = sample(logits, sampling, jax.random.fold_in(key, step))
    return tokens, seen.at[jnp.arange(len(tokens)), tokens].set(True)


def seen_tokens(prompts: list[np.ndarray], vocab_size: int) -> jax.Array:
    """Returns bool [b, v]: which tokens are in each prompt."""
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return jnp.asarray(seen)
