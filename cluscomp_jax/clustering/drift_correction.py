"""Drift correction: a kernel is moved so that the compressed model's inputs give the original outputs.

When a kernel is compressed, its inputs x are no longer the inputs x0 of the original model: they have drifted. So has
the residual r that its outputs are added to. To quantise the original weights W would repair none of that. Drift
correction first replaces W by the ridge regression of the original outputs x0 W + r0 - r on x. (The same first step,
without the residual, is in GPTAQ, Li et al. 2025, and Qronos, Zhang et al. 2025.)
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core.cholesky import DAMPING_RETRIES, blocked_cholesky
from cluscomp_jax.core.second_moments import MATRIX_UNITS


class LayerStatistics(NamedTuple):
    """Statistics of the inputs x [d_in] of an input group, float32, means over positions.

    Attributes:
      hessian: `[d_in, d_in]`, H = E[x x^T].
      drift: `[d_in, d_in]`, E[x (x0 - x)^T], x0 the original stream's inputs. None where the original stream is not
        given, and where `errors` is there instead.
      errors: `[d_in, d_out]`, E[x e^T], e = (x0 - x) W + r0 - r the error of the residual stream after the group's one
        projection W. None where the outputs are not added to a residual.
    """

    hessian: jax.Array
    drift: jax.Array | None = None
    errors: jax.Array | None = None


def corrected(
    weights: Iterable[jax.Array | np.ndarray], statistics: LayerStatistics, *, ridge: float
) -> Iterator[jax.Array]:
    """Yields the kernels float32 [d_in, d_out] W + (H + ridge m I)^-1 E[x e^T], m the mean of H's diagonal.

    Args:
      weights: [d_in, d_out] each, the original W, floating. An array of the host is copied to the device after the root
        is computed, which needs the memory.
      statistics: the Hessian, with drift or errors.
      ridge: > 0; the larger it is, the closer the result is to W. Where it is too little for a Cholesky root, it is
        raised tenfold, up to four times.

    Raises:
      FloatingPointError: the Hessian has no Cholesky root at any of these ridges.
    """
    for retry in range(DAMPING_RETRIES):
        root = ridge_root(statistics.hessian, ridge * 10.0**retry)
        if bool(jnp.isfinite(jnp.diagonal(root)).all()):
            for weight in weights:
                yield corrected_kernel(weight, root, statistics.drift, statistics.errors)
            return
    raise FloatingPointError(
        f"the Hessian of {statistics.hessian.shape[0]} channels has no Cholesky root even with a ridge of "
        f"{ridge * 10.0 ** (DAMPING_RETRIES - 1)} times the mean of its diagonal"
    )


@jax.jit
def ridge_root(hessian: jax.Array, ridge: jax.Array) -> jax.Array:
    """Returns the lower Cholesky root float32 [d_in, d_in] of H + ridge m I, m the mean of H's diagonal.

    It is a program of its own, because it needs twice its memory while it runs.

    Args:
      hessian: H float32 [d_in, d_in], symmetric.
      ridge: scalar, > 0. Too small, it gives a root with NaN on its diagonal.
    """
    mean = jnp.mean(jnp.diagonal(hessian))
    damped = hessian + ridge * jnp.where(mean > 0, mean, 1.0) * jnp.eye(len(hessian), dtype=jnp.float32)
    return blocked_cholesky(damped)


@jax.jit
def corrected_kernel(
    weight: jax.Array, root: jax.Array, drift: jax.Array | None, errors: jax.Array | None
) -> jax.Array:
    """Returns the kernel float32 [d_in, d_out] W + (root root^T)^-1 E[x e^T].

    Args:
      weight: W [d_in, d_out], floating; computed in float32.
      root: float32 [d_in, d_in], lower triangular, of `ridge_root`.
      drift: float32 [d_in, d_in], as in `LayerStatistics`; read only where `errors` is None.
      errors: float32 [d_in, d_out], as in `LayerStatistics`, or None.
    """
    weight = weight.astype(jnp.float32)
    if errors is None:
        assert drift is not None
        errors = jnp.dot(drift, weight, precision=MATRIX_UNITS)
    # Solved from the right, transposed: GPU solvers expect column-major arrays, which the transposed rows are.
    solve = partial(jax.lax.linalg.triangular_solve, root.T, left_side=False, lower=False)
    return weight + solve(solve(errors.T), transpose_a=True).T
