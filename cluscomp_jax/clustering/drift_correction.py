"""Where a kernel should go so that drifted inputs give the outputs that the original inputs gave.

By the time a kernel is compressed its inputs x are no longer those of the original model, x0, and nor is the residual
r that its outputs are added to. Quantising the original weights W would repair none of that; this moves them first
to the ridge regression of the original outputs x0 W + r0 - r on x. (The same first step, without the residual, is in
GPTAQ, Li et al. 2025, and Qronos, Zhang et al. 2025.)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core.cholesky import DAMPING_RETRIES, blocked_cholesky


class LayerStatistics(NamedTuple):
    """Second moments of the inputs x [d_in] of a site, float32, means over positions.

    Attributes:
      inputs: E[x x^T] [d_in, d_in].
      drift: E[x (x0 - x)^T] [d_in, d_in], x0 the original stream's inputs; None where it is not known, and where
        `errors` says more.
      errors: E[x e^T] [d_in, d_out], e = (x0 - x) W + r0 - r what the outputs of the site's one kernel lack on their
        residual; None where outputs are added to none.
    """

    hessian: jax.Array
    drift: jax.Array | None = None
    errors: jax.Array | None = None


def corrected(weight: jax.Array | np.ndarray, statistics: LayerStatistics, *, ridge: float) -> jax.Array:
    """Returns the kernel float32 [d_in, d_out] W + (E[x x^T] + ridge m I)^-1 E[x e^T], m the mean of E[x_i^2].

    Args:
      weight: [d_in, d_out], the original W; from the host it comes to the device behind the root, which needs the room.
      moments: with drift or errors.
      ridge: > 0; the larger, the nearer to W; tenfold, up to four times, if it is too little to solve with.

    Raises:
      FloatingPointError: the moments cannot be factorised.
    """
    for retry in range(DAMPING_RETRIES):
        root = ridge_root(statistics.hessian, ridge * 10.0**retry)
        if bool(jnp.isfinite(jnp.diagonal(root)).all()):
            moved: jax.Array = corrected_kernel(weight, root, statistics.drift, statistics.errors)
            return moved
    raise FloatingPointError(
        f"second moments of {statistics.hessian.shape[0]} channels cannot be factorised even with a ridge of "
        f"{ridge * 10.0 ** (DAMPING_RETRIES - 1)} times their mean"
    )


@jax.jit
def ridge_root(hessian: jax.Array, ridge: jax.Array) -> jax.Array:
    """Returns the lower root of E[x x^T] + ridge m I, a program of its own: it needs twice its memory while it runs."""
    mean = jnp.mean(jnp.diagonal(hessian))
    damped = hessian + ridge * jnp.where(mean > 0, mean, 1.0) * jnp.eye(len(hessian), dtype=jnp.float32)
    return blocked_cholesky(damped)


@jax.jit
def corrected_kernel(
    weight: jax.Array, root: jax.Array, drift: jax.Array | None, errors: jax.Array | None
) -> jax.Array:
    """Returns the kernel [d_in, d_out], float32, moved by the ridge regression of `errors` and `drift` under `root`."""
    weight = weight.astype(jnp.float32)
    if errors is None:
        assert drift is not None
        errors = jnp.dot(drift, weight, precision="highest")
    # Solved from the right, transposed: GPU solvers want columns side by side, and that is what rows become.
    solve = partial(jax.lax.linalg.triangular_solve, root.T, left_side=False, lower=False)
    return weight + solve(solve(errors.T), transpose_a=True).T
