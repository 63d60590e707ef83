"""The arithmetic and memory traffic of a traced program, counted; and the least time they take at given rates.

Counted from the jaxpr, before XLA: products of matrices, gathers, scatters and sorts read and write their operands,
everything else is taken to be fused into what surrounds it. What no result depends on is not counted, as XLA leaves it
out. A loop whose length is not known counts once, and a switch of several branches as if they took turns.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from pallas_kernels.backend import MATRIX_KERNELS

LAUNCH_SECONDS = 5e-6
"""Seconds from one kernel to the next, as usually published: what a loop of short steps is made of."""
_MOVING = {"gather", "sort", "cholesky", "triangular_solve", "dot_general", "top_k"}

_OPAQUE = {"pallas_call", "custom_vjp_call", "custom_jvp_call"}
"""Operations that may hold a GPU kernel, of which not every one states its operations."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does.

    Attributes:
      matrix: operations of matrix products with 16-bit operands; those of TensorFloat-32 count twice, because matrix
        units have half the rate for them.
      vector: all other operations, float32.
      moved: bytes read and written.
      steps: kernels that must follow one another, at the least; a plan for a GPU puts the launches that XLA's module
        has in their place.
    """

    matrix: float = 0.0
    vector: float = 0.0
    moved: float = 0.0
    steps: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: float) -> "Work":
        """Returns the work of this many calls."""
        return Work(*(count * value for value in dataclasses.astuple(self)))

    def least_seconds(self, *, matrix_rate: float, vector_lr_scale: float, bandwidth: float) -> float:
        """Returns the time at published rates, arithmetic and traffic overlapping, kernels following one another."""
        busy = max(self.matrix / matrix_rate + self.vector / vector_lr_scale, self.moved / bandwidth)
        return busy + self.steps * LAUNCH_SECONDS


def count_work(closed: core.ClosedJaxpr) -> Work:
    """Returns the work of one call of a traced program."""
    inside = _count(closed.jaxpr)
    outside = sum(_bytes(var) for var in (*closed.jaxpr.invars, *closed.jaxpr.outvars))
    return inside + Work(moved=outside, steps=1.0)


def operations_of(closed: core.ClosedJaxpr) -> tuple[str, ...]:
    """Returns the names of a traced program's operations in order, those of loops and branches too, without sizes."""
    return tuple(_names(closed.jaxpr))


def _names(jaxpr: core.Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                    yield from _names(_open(inner))


def _count(jaxpr: core.Jaxpr) -> Work:
    return sum(map(_count_equation, _needed(jaxpr)), Work())


def _needed(jaxpr: core.Jaxpr) -> list[Any]:
    """Returns the equations that the results depend on, or that have effects, in order."""
    read = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or read.intersection(eqn.outvars):
            kept.append(eqn)
            read.update(var for var in eqn.invars if isinstance(var, core.Var))
    return kept[::-1]


def _count_equation(eqn: Any) -> Work:
    name = eqn.primitive.name
    if name == "cond":
        return _count_branches(eqn)
    if name == "pallas_call" and (cost := eqn.params.get("cost_estimate")) is not None:
        narrow = eqn.invars[0].aval.dtype.itemsize <= 2
        kind = "matrix" if narrow and eqn.params["name"] in MATRIX_KERNELS else "vector"
        return Work(**{kind: float(cost.flops)}, moved=float(cost.bytes_accessed), steps=1.0)
    inner = [_open(value) for value in eqn.params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
    if inner:
        work = sum((_count(jaxpr) for jaxpr in inner), Work())
        # A step of a loop is a kernel at least, even where everything in it is fused.
        return (work + Work(steps=1.0)).times(eqn.params["length"]) if name == "scan" else work
    operations, on_matrix_units = _operations(eqn), _matrix_cost(eqn)
    moves = name in _MOVING or name.startswith("scatter")
    return Work(
        matrix=on_matrix_units * operations,
        vector=0.0 if on_matrix_units else operations,
        moved=float(sum(_bytes(var) for var in (*eqn.invars, *eqn.outvars))) if moves else 0.0,
        steps=1.0 if moves else 0.0,
    )


def _count_branches(eqn: Any) -> Work:
    """Returns the work of a branch: of a choice by platform, that of a card."""
    branches = [branch.jaxpr for branch in eqn.params["branches"]]
    for branch, platforms in zip(branches, eqn.params.get("branches_platforms", ()), strict=False):
        if platforms is not None and "cuda" in platforms and not _OPAQUE.intersection(_names(branch)):
            return _count(branch)
    kernels = [branch for branch in branches if "pallas_call" in _names(branch)]
    if kernels:  # a card runs GPU kernels, and of two branches that hold some the shorter
        return min(map(_count, kernels), key=lambda work: work.steps)
    works = [_count(branch) for branch in branches]
    if len(works) > 2:
        return sum(works, Work()).times(1 / len(works))
    return max(works, key=lambda work: work.matrix + work.vector)


def _matrix_cost(eqn: Any) -> float:
    """Returns what an operation of a product costs on matrix units, next to one of 16-bit operands; 0: not on them."""
    if eqn.primitive.name != "dot_general":
        return 0.0
    if all(var.aval.dtype.itemsize <= 2 for var in eqn.invars):
        return 1.0
    return 2.0 if eqn.params["precision"] == (jax.lax.Precision.HIGH,) * 2 else 0.0


def _open(value: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return value.jaxpr if isinstance(value, core.ClosedJaxpr) else value


def _operations(eqn: Any) -> float:
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        summed = math.prod(int(eqn.invars[0].aval.shape[axis]) for axis in contracted)
        return float(2 * math.prod(out.shape) * summed)
    if name == "cholesky":
        return float(math.prod(out.shape) * out.shape[-1] / 3)
    if name == "triangular_solve":
        return float(math.prod(out.shape) * eqn.invars[0].aval.shape[-1])
    if name == "sort":
        return float(math.prod(out.shape)) * max(math.log2(max(out.shape[-1], 1)), 1.0)
    if name.startswith("reduce") or name.startswith("arg"):
        return float(math.prod(eqn.invars[0].aval.shape))
    return float(math.prod(getattr(out, "shape", ())))


def _bytes(var: Any) -> int:
    aval = var.aval
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(aval, "shape", ())) * itemsize
