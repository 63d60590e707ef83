"""The lower Cholesky root of a Hessian of any number of channels."""

from functools import partial

import jax
import jax.numpy as jnp

_WHOLE = 16384
"""Most rows that one call of the backend's own factorisation gets."""
_PANEL = 4096

DAMPING_RETRIES = 5
"""Attempts at a factorisation, each with ten times as much added to the diagonal as the one before."""


def blocked_cholesky(matrix: jax.Array) -> jax.Array:
    """Returns the lower triangular L of L L^T = matrix, float32 [i, i]; NaN where it is not positive definite.

    More than 16,384 rows are factorised in panels of columns, from left to right: OpenBLAS, which JAX calls on a CPU,
    writes past its memory at 28,672 rows on several threads, and other backends need less memory so.

    Args:
      matrix: float32 [i, i], symmetric; only its lower triangle is read.
    """
    rows = len(matrix)
    if rows <= _WHOLE:
        whole: jax.Array = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        return whole
    panels: list[jax.Array] = []
    for begin in range(0, rows, _PANEL):
        width = min(_PANEL, rows - begin)
        panel = matrix[begin:, begin : begin + width]
        for left in panels:
            left = left[-len(panel) :]
            panel = panel - jnp.dot(left, left[:width].T, precision="highest")
        top = jax.lax.linalg.cholesky(panel[:width], symmetrize_input=False)
        solve = partial(jax.lax.linalg.triangular_solve, top, left_side=False, lower=True, transpose_a=True)
        panels.append(jnp.concatenate([top, solve(panel[width:])]))
    return jnp.concatenate([jnp.pad(panel, ((rows - len(panel), 0), (0, 0))) for panel in panels], axis=1)
