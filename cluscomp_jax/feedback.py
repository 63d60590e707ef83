"""Error feedback: codes chosen one input channel after another, each channel making good the errors before it.

The idea of OBQ and GPTQ (Frantar et al., 2022) for vectors along the output axis, whose g weights share one input
channel. With inputs X of second moment H = E[x x^T] the output error is tr((W - Q)^T H (W - Q)). Fixing channel i to
its codes and minimising over the channels after it moves these by -U[i, i+1:]^T (W[i] - Q[i]) / U[i, i], where
H^-1 = U^T U with U upper triangular, and leaves an error of sum_i |W[i] - Q[i]|^2 / U[i, i]^2.

Letters: i input channels, o outputs, n codes, g weights per code, c = ceil(o/g) codes per channel.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.kmeans import add_up, assign, mean_offset

_ROWS = 128
"""Channels whose errors reach the channels after them together: one product of matrices instead of many sums."""
_RETRIES = 4
"""A factorisation that fails is tried again with ten times the damping."""


class Feedback(NamedTuple):
    """Channels int32 [i] in the order in which they are coded, and the factor U [i, i] for that order."""

    order: jax.Array
    factor: jax.Array

    @property
    def channel_weights(self) -> jax.Array:
        """The weight float32 [i] of each channel's squared error once the channels after it have answered."""
        diagonal = jnp.diagonal(self.factor)
        return jnp.zeros_like(diagonal).at[self.order].set(1.0 / jnp.square(diagonal))


def factorise(moments: jax.Array, *, damping: float = 0.01) -> Feedback:
    """Returns the order and factor for second moments E[x x^T], float32 [i, i].

    Channels of large moment come first, while many are left to make good their errors. A channel that is never active
    keeps its own codes and answers for none.

    Args:
      damping: share of the mean diagonal that is added to it, > 0; tenfold, up to four times, if that is too little.

    Raises:
      FloatingPointError: the moments cannot be factorised.
    """
    for retry in range(_RETRIES + 1):
        feedback: Feedback = _factorise(moments, damping * 10.0**retry)
        if bool(jnp.isfinite(feedback.factor).all()):
            return feedback
    raise FloatingPointError(
        f"second moments of {moments.shape[0]} channels cannot be factorised even with a damping of "
        f"{damping * 10.0**_RETRIES} times their mean"
    )


@jax.jit
def _factorise(moments: jax.Array, damping: jax.Array) -> Feedback:
    diagonal = jnp.diagonal(moments)
    order = jnp.argsort(-diagonal, stable=True).astype(jnp.int32)
    mean = jnp.mean(diagonal)
    added = damping * jnp.where(mean > 0, mean, 1.0)
    damped = moments[order][:, order] + added * jnp.eye(len(order))
    # Reversed twice, the lower factor of the reversed matrix is an upper R with H = R R^T: H^-1 = R^-T R^-1, U = R^-1.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return Feedback(order, jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(order)), lower=False))


@partial(jax.jit, static_argnames="g")
def assign_with_feedback(
    weight: jax.Array, codebook: jax.Array, feedback: Feedback, *, g: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (index int32 [i, c], targets float32 [i, c*g]): the codes, and the weights as they were when coded.

    Args:
      weight: [i, o].
      codebook: [n, g], as it will be stored; computed in float32.
    """
    channels, outputs = weight.shape
    codebook = codebook.astype(jnp.float32)
    rows = min(_ROWS, channels)
    spare = -channels % rows
    # Spare channels at the end are zero, and their row and column of the factor an identity's.
    ordered = jnp.pad(weight.astype(jnp.float32)[feedback.order], ((0, spare), (0, -outputs % g)))
    factor = jnp.pad(feedback.factor, ((0, spare), (0, spare)))
    real = jnp.arange(ordered.shape[1]) < outputs  # what pads the last vector stays zero
    diagonal = jnp.where(jnp.arange(channels + spare) < channels, jnp.diagonal(factor), 1.0)

    def code_rows(left: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        block = jax.lax.dynamic_slice_in_dim(left, first, rows)
        within = jax.lax.dynamic_slice(factor, (first, first), (rows, rows))

        def code_row(
            carried: tuple[jax.Array, jax.Array], i: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            block, errors = carried
            vectors = block[i].reshape(-1, g)
            index, _ = assign(vectors, codebook)
            error = jnp.where(real, (vectors - codebook[index]).reshape(-1), 0.0) / diagonal[first + i]
            after = jnp.where(jnp.arange(rows) > i, within[i], 0.0)
            return (block - after[:, None] * error, errors.at[i].set(error)), index

        (block, errors), index = jax.lax.scan(code_row, (block, jnp.zeros_like(block)), jnp.arange(rows))
        across = jax.lax.dynamic_slice_in_dim(factor, first, rows)
        later = jnp.where(jnp.arange(channels + spare) >= first + rows, across, 0.0)
        return left - jnp.dot(later.T, errors, precision="highest"), (index, block)

    firsts = jnp.arange(0, channels + spare, rows)
    _, (index, targets) = jax.lax.scan(code_rows, ordered, firsts)
    back = jnp.argsort(feedback.order)
    return index.reshape(channels + spare, -1)[back], targets.reshape(channels + spare, -1)[back]


@jax.jit
def refit_codebook(codebook: jax.Array, index: jax.Array, targets: jax.Array, feedback: Feedback) -> jax.Array:
    """Returns the codebook float32 [n, g] moved to the means of the targets it was chosen for, weighted by channel.

    A code that was never chosen stays where it is. Arguments as `assign_with_feedback` takes and returns them.
    """
    n, g = codebook.shape
    mass = jnp.repeat(feedback.channel_weights, index.shape[1])
    offset = targets.reshape(-1, g) - codebook.astype(jnp.float32)[index.reshape(-1)]
    sums, _ = add_up(jnp.zeros((n, g + 1)), offset, mass, index.reshape(-1))
    return codebook.astype(jnp.float32) + mean_offset(sums)
