"""Pallas' Triton backend: its names, and how a GPU kernel is launched. Nothing else in the project imports it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

__all__ = ["Ref", "launcher", "pl", "plgpu", "span"]

Ref = Any


MATRIX_KERNELS = frozenset({"codebook_gemm", "codebook_scatter"})
"""The names of kernels that multiply on matrix units, where their operands have 16 bit."""


def launcher(
    kernel: Callable[..., None],
    name: str,
    *,
    grid: tuple[int, ...],
    out: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    operations: float | None = None,
    moved: float = 0.0,
    **options: Any,
) -> Callable[..., Any]:
    """Returns the GPU kernel as a function of arrays; every program sees all of every array.

    Args:
      kernel: takes a reference for every argument and every result.
      name: of the kernel in the compiled module.
      grid: programs along x, y and z.
      out: (shape, dtype) of the result, or a list of them.
      num_warps, num_stages: of 32 threads each; loads in flight.
      interpret: step by step on any device.
      operations: of all programs together; None: not stated. Those of MATRIX_KERNELS are of matrix units.
      moved: bytes that they read and write of device memory, where `operations` is stated.
      options: of `pallas_call`.
    """
    shapes = [jax.ShapeDtypeStruct(*one) for one in (out if isinstance(out, list) else [out])]  # type: ignore[no-untyped-call]
    if operations is not None:
        cost = pl.CostEstimate(flops=int(operations), transcendentals=0, bytes_accessed=int(moved))
        options = {"cost_estimate": cost, **options}
    launch: Callable[..., Any] = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=shapes if isinstance(out, list) else shapes[0],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
        **options,
    )
    return launch


def span(start: Any, size: int) -> jax.Array:
    """Returns the int32 numbers start, start + 1, ... [size]."""
    places: jax.Array = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    return places
