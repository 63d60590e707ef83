"""Error feedback as in OBQ and GPTQ (Frantar et al., 2022): each input channel compensates the errors before it.

Codes are chosen one input channel after another. The vectors run along the output axis, so that the g weights of a
vector share one input channel. With the Hessian H = E[x x^T] = R R^T of the inputs x, R upper triangular, the output
error of E = W - Q is

    tr(E^T H E) = |R^T E|^2 = sum_i R_ii^2 |E_i + sum_{j<i} R_ji / R_ii E_j|^2.

So channel i takes the codes nearest to W_i + sum_{j<i} R_ji / R_ii E_j, and every term is as small as the choices
before it allow. These are the codes of OBQ, which instead moves the weights not coded yet by rows of a factor of H^-1.
Here no inverse is computed (the equivalence is that of Babai's nearest plane: Chen et al., 2025).

Letters: i input channels, o outputs, n codes, g weights per code, c = ceil(o/g) codes per channel.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.clustering.code_search import CodeSearch
from cluscomp_jax.clustering.walk import Rows, walked
from cluscomp_jax.core.cholesky import DAMPING_RETRIES, blocked_cholesky
from cluscomp_jax.core.second_moments import MATRIX_UNITS

_BLOCK_SIZE = 128
"""Channels whose errors are added to the channels after them in one product of matrices, instead of many sums."""
_PARTS = 8
"""Most parts of the channels, of four blocks at least. A block's product begins with its own part: what comes before
has no errors yet. So 9/16 of the product of all channels is computed."""


class HessianFactor(NamedTuple):
    """The Cholesky root of a damped Hessian H, and the order in which channels are coded (`act_order` in GPTQ).

    Attributes:
      act_order: int32 [i], the channels from the one coded last to the one coded first.
      root: float32 [i, i], lower triangular, root root^T = H with rows and columns in that order. The last row belongs
        to the channel coded first: R is this root read backwards.
    """

    act_order: jax.Array
    root: jax.Array

    @property
    def channel_weights(self) -> jax.Array:
        """R_ii^2, float32 [i] by channel: the weight of the squared distance between its codes and their target."""
        squares = jnp.square(jnp.diagonal(self.root))
        return jnp.zeros_like(squares).at[self.act_order].set(squares)


def factor_hessian(hessian: jax.Array, *, damping: float = 0.01, shrinkage: float = 0.0) -> HessianFactor:
    """Returns the HessianFactor of the Hessian, shrunk towards its diagonal and damped.

    Channels with a large diagonal E[x_i^2] are coded first, while many others are left to compensate their errors. A
    channel that is never active takes the codes nearest to its weights and compensates nothing.

    Args:
      hessian: E[x x^T] float32 [i, i], symmetric, positive semidefinite.
      damping: share of the mean diagonal that is added to the diagonal, > 0. Where that is too little for a Cholesky
        root, it is raised tenfold, up to four times.
      shrinkage: s of (1 - s) H + s diag H, in [0, 1]. The moments E[x_i x_j] of few samples are less certain than the
        squares E[x_i^2] (Ledoit and Wolf, 2004, shrink a covariance towards a multiple of the identity instead).

    Raises:
      FloatingPointError: the Hessian has no Cholesky root at any of these dampings.
    """
    for retry in range(DAMPING_RETRIES):
        factor: HessianFactor = factor_damped(hessian, damping * 10.0**retry, shrinkage)
        if bool(is_root(factor.root)):
            return factor
    raise FloatingPointError(
        f"the Hessian of {hessian.shape[0]} channels has no Cholesky root even with a damping of "
        f"{damping * 10.0 ** (DAMPING_RETRIES - 1)} times the mean of its diagonal"
    )


@jax.jit
def is_root(root: jax.Array) -> jax.Array:
    """Returns whether a Cholesky root [i, i] was found: its diagonal is finite."""
    return jnp.isfinite(jnp.diagonal(root)).all()


@jax.jit
def factor_damped(hessian: jax.Array, damping: jax.Array, shrinkage: jax.Array) -> HessianFactor:
    """Returns the HessianFactor of (1 - s) H + s diag H + damping * mean(diag H) * I: one attempt of `factor_hessian`.

    Args:
      hessian: H float32 [i, i], symmetric.
      damping: scalar, > 0. Too small, it gives a root with NaN on its diagonal.
      shrinkage: s, scalar in [0, 1].
    """
    diagonal = jnp.diagonal(hessian)
    order = jnp.argsort(diagonal, stable=True).astype(jnp.int32)
    mean = jnp.mean(diagonal)
    added = damping * jnp.where(mean > 0, mean, 1.0)
    off_diagonal = (1.0 - shrinkage) * hessian[order[:, None], order[None, :]]
    damped = jnp.where(jnp.eye(len(order), dtype=bool), diagonal[order] + added, off_diagonal)
    return HessianFactor(order, blocked_cholesky(damped))


def _added(begin: int, columns: jax.Array, errors: jax.Array) -> jax.Array:
    """Returns columns^T errors float32 [r, o]; errors of channels not coded yet are 0, those before `begin` among them.

    Args:
      begin: static.
      columns: of the root, float32 [i, r].
      errors: float32 [i, o].
    """
    return jnp.dot(columns[begin:].T, errors[begin:], precision=MATRIX_UNITS)


@jax.jit
def assign_with_error_feedback(
    weight: jax.Array, codebook: jax.Array, factor: HessianFactor, search: CodeSearch
) -> jax.Array:
    """Returns the codes int32 [i, c] that error feedback chooses.

    Args:
      weight: W [i, o], floating; computed in float32.
      codebook: [n, g], floating, as it will be stored; computed in float32.
      factor: act_order int32 [i] and root float32 [i, i] of the Hessian of the inputs.
      search: for the codes of one channel.
    """
    (channels, outputs), g = weight.shape, codebook.shape[1]
    codebook = codebook.astype(jnp.float32)
    rows = min(_BLOCK_SIZE, channels)
    spare = -channels % rows
    # Channels of padding come first in this order and are coded last. They are zero, and their diagonal of the root 1.
    ordered = jnp.pad(weight.astype(jnp.float32)[factor.act_order], ((spare, 0), (0, -outputs % g)))
    root = jnp.pad(factor.root, ((spare, 0), (spare, 0))) if spare else factor.root
    diagonal = jnp.where(jnp.arange(spare + channels) < spare, 1.0, jnp.diagonal(root))
    real = jnp.arange(ordered.shape[1]) < outputs  # what pads the last vector stays zero

    def scan_rows(search: CodeSearch, codebook: jax.Array, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
        block, before, within, scale = args

        def code_row(own: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            target = block[i] + (before[i] + jnp.dot(within[:, i], own, precision="highest")) / scale[i]
            index = search.choose(target, codebook, outputs=outputs)
            error = jnp.where(real, block[i] - codebook[index].reshape(-1), 0.0)
            return own.at[i].set(error), index

        own, coded = jax.lax.scan(code_row, jnp.zeros_like(block), jnp.arange(rows), reverse=True)
        return own, coded

    def rows_of(block: jax.Array, before: jax.Array, within: jax.Array, scale: jax.Array) -> Rows:
        return Rows(block + before / scale[:, None], block, within.T / scale[:, None], None)

    def finish(coded: jax.Array, own: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(real, own, 0.0), coded

    def code_rows(errors: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = jax.lax.dynamic_slice_in_dim(root, first, rows, axis=1)
        before = jax.lax.switch(first // part, [partial(_added, begin) for begin in begins], columns, errors)
        block = jax.lax.dynamic_slice_in_dim(ordered, first, rows)
        within = jax.lax.dynamic_slice_in_dim(columns, first, rows)
        scale = jax.lax.dynamic_slice_in_dim(diagonal, first, rows)
        arguments = (block, before, within, scale)
        own, coded = walked(search, scan_rows, rows_of, finish, *arguments, codebook=codebook, outputs=outputs)
        return jax.lax.dynamic_update_slice_in_dim(errors, own, first, axis=0), coded

    firsts = jnp.arange(0, spare + channels, rows)
    part = -(-len(firsts) // max(1, min(_PARTS, len(firsts) // 4))) * rows
    begins = range(0, spare + channels, part)
    _, index = jax.lax.scan(code_rows, jnp.zeros_like(ordered), firsts, reverse=True)
    return index.reshape(spare + channels, -1)[jnp.argsort(factor.act_order) + spare]
