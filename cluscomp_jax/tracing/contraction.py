"""One dot_general of an array and a TracedKernel, computed as x @ W where the contracted axes are W's inputs.

Letters: s stacked axes of the kernel, d_in, d_out the sides of its matrices.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.tracing.kernel import Atom, TracedKernel

Product = Callable[[TracedKernel, jax.Array, Any], tuple[Any, ...]]
"""Called as product(kernel of one matrix, x [..., d_in], out_dtype); returns a tuple, y [..., d_out] first."""


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The dimension numbers of a dot_general, its kernel on either side.

    Attributes:
      x_axes, w_axes: contracted axes of x and of the kernel, pair by pair.
      x_batch, w_batch: batch axes, likewise.
      kernel_first: the kernel is the left operand.
    """

    x_axes: tuple[int, ...]
    w_axes: tuple[int, ...]
    x_batch: tuple[int, ...]
    w_batch: tuple[int, ...]
    kernel_first: bool


def read_contraction(dimension_numbers: Any, kernel_first: bool) -> Contraction:
    """Returns the Contraction of a dot_general's `dimension_numbers`."""
    (left, right), (left_batch, right_batch) = dimension_numbers
    if kernel_first:
        return Contraction(tuple(right), tuple(left), tuple(right_batch), tuple(left_batch), True)
    return Contraction(tuple(left), tuple(right), tuple(left_batch), tuple(right_batch), False)


def hindrance(kernel: TracedKernel, x: Any, c: Contraction) -> str | None:
    """Returns why the contraction is no product x @ W, or None."""
    inner = [atom for axis in c.w_axes for atom in kernel.dims[axis] if atom.size > 1]
    batch = [atom for axis in c.w_batch for atom in kernel.dims[axis]]
    every = [atom for dim in kernel.dims for atom in dim if atom.side == "in" and atom.size > 1]
    if jnp.dtype(x.dtype) != jnp.dtype(kernel.dtype):
        return f"x is {x.dtype}, the kernel {kernel.dtype}"
    if {atom.side for atom in inner} - {"in"} or sorted(inner) != sorted(every):
        return "the contracted axes are not the kernel's inputs"
    if {atom.side for atom in batch} - {"stack"}:
        return "a batch axis is none of the kernel's stacked axes"
    return None


def multiply(kernel: TracedKernel, x: jax.Array, c: Contraction, out_dtype: Any, product: Product) -> Any:
    """Returns what `product` does, its first result with the axes of the dot_general; `hindrance` must be None.

    The other results of `product` come stacked in front by the kernel's stacked axes.
    """
    batch = tuple(atom for axis in c.w_batch for atom in kernel.dims[axis])
    free = tuple(atom for axis in _free(kernel, c) for atom in kernel.dims[axis] if atom.side == "stack")
    rows, kept = _arranged(kernel, x, c)
    x_free = rows.shape[len(batch) : -1]

    def over(kernel: TracedKernel, x: jax.Array, batch: tuple[Atom, ...], free: tuple[Atom, ...]) -> tuple[Any, ...]:
        if not batch and not free:
            done: tuple[Any, ...] = product(kernel, x, out_dtype)
            return done
        atom = (*batch, *free)[0]
        alone = kernel.unstacked(atom)
        if batch:
            return jax.lax.map(lambda pair: over(_like(alone, pair[0]), pair[1], batch[1:], free), (alone.payload, x))
        return jax.lax.map(lambda payload: over(_like(alone, payload), x, (), free[1:]), alone.payload)

    y, *others = over(kernel, rows, batch, free)
    order = [(*batch, *free).index(atom) for atom in kernel.stack]
    others = jax.tree.map(lambda leaf: leaf.transpose((*order, *range(len(order), leaf.ndim))), others)
    outs = sorted((a for dim in kernel.dims for a in dim if a.side == "out" and a.size > 1), key=lambda a: a.place)
    y = y.reshape(*(a.size for a in (*batch, *free)), *x_free, *(a.size for a in outs))
    atoms: list[Any] = [*batch, *free, *range(len(x_free)), *outs]
    w_side = [a for axis in _free(kernel, c) for a in kernel.dims[axis] if a.side == "stack" or a.size > 1]
    x_side = list(range(len(x_free)))
    sides: list[list[Any]] = [w_side, x_side] if c.kernel_first else [x_side, w_side]
    y = y.transpose([atoms.index(name) for name in (*batch, *sides[0], *sides[1])])
    w_shape = tuple(kernel.shape[axis] for axis in _free(kernel, c))
    x_shape = tuple(x.shape[axis] for axis in kept)
    before, after = (w_shape, x_shape) if c.kernel_first else (x_shape, w_shape)
    return (y.reshape(*(x.shape[axis] for axis in c.x_batch), *before, *after), *others)


def _like(kernel: TracedKernel, payload: Any) -> TracedKernel:
    return dataclasses.replace(kernel, payload=payload)


def _free(kernel: TracedKernel, c: Contraction) -> list[int]:
    return [axis for axis in range(len(kernel.dims)) if axis not in (*c.w_axes, *c.w_batch)]


def _arranged(kernel: TracedKernel, x: jax.Array, c: Contraction) -> tuple[jax.Array, list[int]]:
    """Returns (x [batch atoms..., free axes..., d_in], its free axes)."""
    kept = [axis for axis in range(x.ndim) if axis not in (*c.x_axes, *c.x_batch)]
    x = x.transpose((*c.x_batch, *kept, *c.x_axes))
    batch = [atom for axis in c.w_batch for atom in kernel.dims[axis]]
    inner = [atom for axis in c.w_axes for atom in kernel.dims[axis] if atom.size > 1]
    lead = [*(atom.size for atom in batch), *x.shape[len(c.x_batch) : len(c.x_batch) + len(kept)]]
    x = x.reshape(*lead, *(atom.size for atom in inner))
    order = sorted(range(len(inner)), key=lambda k: inner[k].place)
    x = x.transpose(*range(len(lead)), *(len(lead) + k for k in order))
    return x.reshape(*lead, math.prod(atom.size for atom in inner)), kept
