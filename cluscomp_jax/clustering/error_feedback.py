"""Error feedback: codes chosen one input channel after another, each channel making good the errors before it.

The idea of OBQ and GPTQ (Frantar et al., 2022) for vectors along the output axis, whose g weights share one input
channel. With inputs X of second moment H = E[x x^T] = R R^T, R upper triangular, the output error of E = W - Q is

    tr(E^T H E) = |R^T E|^2 = sum_i R_ii^2 |E_i + sum_{j<i} R_ji / R_ii E_j|^2.

So channel i takes the codes nearest to W_i + sum_{j<i} R_ji / R_ii E_j, and every term is as small as the choices
before it allow. These are the codes of OBQ, which moves the weights still to come by rows of a factor of H^-1 instead;
here no inverse is made (the equivalence is that of Babai's nearest plane: Chen et al., 2025).

Letters: i input channels, o outputs, n codes, g weights per code, c = ceil(o/g) codes per channel.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.core.cholesky import DAMPING_RETRIES, blocked_cholesky
from cluscomp_jax.kmeans import CodeIndex, nearest_code

_BLOCK_SIZE = 128
"""Channels whose errors reach the channels after them together: one product of matrices instead of many sums."""


class HessianFactor(NamedTuple):
    """Channels int32 [i] from the one coded last to the one coded first, and the lower root [i, i] of H in that order.

    Running backwards through it is running forwards through R.
    """

    act_order: jax.Array
    root: jax.Array

    @property
    def channel_weights(self) -> jax.Array:
        """The weight R_ii^2, float32 [i], of each channel's squared distance from what it should have been."""
        squares = jnp.square(jnp.diagonal(self.root))
        return jnp.zeros_like(squares).at[self.act_order].set(squares)


def factor_hessian(hessian: jax.Array, *, damping: float = 0.01) -> HessianFactor:
    """Returns the order and root of the damped second moments E[x x^T], float32 [i, i].

    Channels of large moment come first, while many are left to make good their errors. A channel that is never active
    keeps its own codes and answers for none.

    Args:
      moments: symmetric, positive semidefinite.
      damping: share of the mean diagonal that is added to it, > 0; tenfold, up to four times, if that is too little.

    Raises:
      FloatingPointError: the moments cannot be factorised.
    """
    for retry in range(DAMPING_RETRIES):
        factor: HessianFactor = factor_damped(hessian, damping * 10.0**retry)
        if bool(jnp.isfinite(jnp.diagonal(factor.root)).all()):
            return factor
    raise FloatingPointError(
        f"second moments of {hessian.shape[0]} channels cannot be factorised even with a damping of "
        f"{damping * 10.0 ** (DAMPING_RETRIES - 1)} times their mean"
    )


@jax.jit
def factor_damped(hessian: jax.Array, damping: jax.Array) -> HessianFactor:
    """Returns the factor of E[x x^T] plus `damping` times the mean of its diagonal; one try of `factor_hessian`."""
    diagonal = jnp.diagonal(hessian)
    order = jnp.argsort(diagonal, stable=True).astype(jnp.int32)
    mean = jnp.mean(diagonal)
    added = damping * jnp.where(mean > 0, mean, 1.0)
    damped = hessian[order[:, None], order[None, :]] + added * jnp.eye(len(order), dtype=jnp.float32)
    return HessianFactor(order, blocked_cholesky(damped))


@partial(jax.jit, static_argnames="g")
def assign_with_error_feedback(
    weight: jax.Array, codebook: jax.Array, factor: HessianFactor, *, g: int, code_index: CodeIndex | None = None
) -> jax.Array:
    """Returns the index int32 [i, c] of the codes.

    Args:
      weight: [i, o].
      codebook: [n, g], as it will be stored; computed in float32.
      forest: of the codes; None: every vector is compared with all of them.
    """
    channels, outputs = weight.shape
    codebook = codebook.astype(jnp.float32)
    rows = min(_BLOCK_SIZE, channels)
    spare = -channels % rows
    # Spare channels in front, which are coded last, are zero, and their part of the root an identity's.
    ordered = jnp.pad(weight.astype(jnp.float32)[factor.act_order], ((spare, 0), (0, -outputs % g)))
    root = jnp.pad(factor.root, ((spare, 0), (spare, 0))) if spare else factor.root
    diagonal = jnp.where(jnp.arange(spare + channels) < spare, 1.0, jnp.diagonal(root))
    real = jnp.arange(ordered.shape[1]) < outputs  # what pads the last vector stays zero

    def code_rows(errors: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = jax.lax.dynamic_slice_in_dim(root, first, rows, axis=1)
        before = jnp.dot(columns.T, errors, precision="highest")  # of channels not coded yet there are no errors
        block = jax.lax.dynamic_slice_in_dim(ordered, first, rows)
        within = jax.lax.dynamic_slice_in_dim(columns, first, rows)
        scale = jax.lax.dynamic_slice_in_dim(diagonal, first, rows)

        def code_row(own: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            target = block[i] + (before[i] + jnp.dot(within[:, i], own, precision="highest")) / scale[i]
            index = nearest_to_row(target, codebook, code_index, outputs=outputs)
            error = jnp.where(real, block[i] - codebook[index].reshape(-1), 0.0)
            return own.at[i].set(error), index

        own, coded = jax.lax.scan(code_row, jnp.zeros_like(block), jnp.arange(rows), reverse=True)
        return jax.lax.dynamic_update_slice_in_dim(errors, own, first, axis=0), coded

    firsts = jnp.arange(0, spare + channels, rows)
    _, index = jax.lax.scan(code_rows, jnp.zeros_like(ordered), firsts, reverse=True)
    return index.reshape(spare + channels, -1)[jnp.argsort(factor.act_order) + spare]


def nearest_to_row(
    target: jax.Array,
    codebook: jax.Array,
    code_index: CodeIndex | None,
    previous: jax.Array | None = None,
    *,
    outputs: int,
) -> jax.Array:
    """Returns the index int32 [c] of the codes nearest to what one channel should be.

    Args:
      target: float32 [c * g], of which the first `outputs` count.
      codebook: float32 [n, g].
      forest: of the codes; None: every vector is compared with all of them.
      known: int32 [c], a code for each vector that is kept unless a nearer one is found.
      outputs: a last vector that reaches beyond them is compared with all codes, by its weights within them.
    """
    g = codebook.shape[1]
    index = nearest_code(target.reshape(-1, g), codebook, code_index, previous)
    within = outputs % g
    if not within:
        return index
    distances = jnp.sum(jnp.square(codebook[:, :within] - target[-g:][:within]), axis=1)
    return index.at[-1].set(jnp.argmin(distances).astype(index.dtype))
