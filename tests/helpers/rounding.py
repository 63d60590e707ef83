"""Bounds on rounding that follow from a dtype and the length of what is summed, not from what one processor gave."""

import jax.numpy as jnp


def epsilon(dtype: str = "float32") -> float:
    """The distance from 1 to the next number of the dtype."""
    return float(jnp.finfo(dtype).eps)


def of_sum(terms: int, dtype: str = "float32", result: str | None = None) -> float:
    """The largest relative error of a sum of so many products in `dtype`, in any order, rounded once to `result`."""
    return terms * epsilon(dtype) + epsilon(result or dtype)
