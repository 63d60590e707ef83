"""The exact nearest code of every vector, by brute force.

Letters: m vectors, n codes, g weights per vector. Vectors are laid out as [g, m], so that neighbouring lanes hold
neighbouring vectors: the loop runs over codes and every step is elementwise over vectors, which is 10 to 20
times faster on the CPU than an argmin over a distance matrix, and needs no [m, n] buffer.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.code_walk.config import nearest_config
from pallas_kernels.implementation import kernels_or_definition

_CHUNK = 131072
"""Vectors per chunk: enough for XLA to spread one step over the cores. Changes the speed only."""
_UNROLL = 16
"""Codes per loop step, kept in registers against one load of the vectors. Changes the speed only."""
_FEW_CODES = 512
"""Below this many codes a quarter of `_UNROLL` saves more compile time than it costs run time."""


@jax.jit
def assign(vectors: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (index int32 [m], squared distance float32 [m]) of the nearest code; ties go to the lowest index.

    Args:
      vectors: [m, g], floating, finite; computed in float32.
      codebook: [n, g], floating, finite; computed in float32.
    """
    return nearest_of_all(vectors.astype(jnp.float32), codebook.astype(jnp.float32))


def nearest_of_all(vectors: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what `assign` returns, by one GPU kernel in a program that is compiled for a GPU.

    Args:
      vectors: float32 [m, g], finite.
      codebook: float32 [n, g], finite.
    """

    def kernels(vectors: jax.Array, codebook: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
        from pallas_kernels.code_walk.many import nearest

        return nearest(vectors, codebook, tile=nearest_config(vectors.shape[1]), interpret=interpret)

    return kernels_or_definition(lambda x, codes: nearest_lanes(x.T, codes), kernels, vectors, codebook)


def nearest_lanes(lanes: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what `assign` returns, for vectors laid out as [g, m].

    Args:
      lanes: float32 [g, m], finite.
      codebook: float32 [n, g], finite.
    """
    g, m = lanes.shape
    chunk = min(_CHUNK, m)
    whole = m // chunk * chunk
    stacked = lanes[:, :whole].reshape(g, -1, chunk).swapaxes(0, 1)
    index, distance = jax.lax.map(partial(_nearest, codebook=codebook), stacked)
    index, distance = index.reshape(-1), distance.reshape(-1)
    if whole < m:
        tail_index, tail_distance = _nearest(lanes[:, whole:], codebook=codebook)
        index = jnp.concatenate([index, tail_index])
        distance = jnp.concatenate([distance, tail_distance])
    return index, distance


def _nearest(lanes: jax.Array, *, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One chunk: lanes [g, c] -> (index [c], squared distance [c])."""
    g, c = lanes.shape
    n = codebook.shape[0]
    unroll = _UNROLL if n >= _FEW_CODES else _UNROLL // 4
    steps = -(-n // unroll)
    # Codes at infinity fill the last step: their distance is never less than the best so far.
    codes = jnp.pad(codebook, ((0, steps * unroll - n), (0, 0)), constant_values=jnp.inf)

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, distance = best
        some = jax.lax.dynamic_slice(codes, (i * unroll, 0), (unroll, g))
        for u in range(unroll):
            d = jnp.square(lanes[0] - some[u, 0])
            for t in range(1, g):
                d += jnp.square(lanes[t] - some[u, t])
            closer = d < distance
            index = jnp.where(closer, i * unroll + u, index)
            distance = jnp.where(closer, d, distance)
        return index, distance

    start = jnp.zeros((c,), jnp.int32), jnp.full((c,), jnp.inf, jnp.float32)
    index, distance = jax.lax.fori_loop(0, steps, step, start)
    return index, distance
