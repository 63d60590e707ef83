"""Bits where they count: (g, num_codes) by matrix under one budget, of the least predicted loss."""

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack, kron

from cluscomp_jax.codebook import Axis, stored_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.rules import predicted_distortion
from cluscomp_jax.settings import CompressionRule

Shapes = Mapping[str, tuple[int, ...]]

_GROUPS = (1, 2, 3, 4, 6, 8)
"""Weights per code that are offered: what lies between them or beyond buys less than half a percent."""
_INDEX_BITS = range(2, 17)
_LEAST, _ABOVE = 0.5, 1.5
"""Index bits per weight that are offered: from this share of the budget to so many above it. With fewer, errors are as
large as weights, of which a prediction to second order knows nothing (docs/experiments.md)."""
_BY_HEART = 2.0
"""Share of the error that is saved for every code per vector; measured: 2 to 4."""
_ENOUGH = {"mip_rel_gap": 1e-3, "node_limit": 200}
"""When branch and bound ends: near the least, or where so many costs are equal that it would count through them all."""
_TOLERANCE = 2e-6
"""Share of the budget that is left over, above what the solver may overlook."""


def tempered(sensitivities: Mapping[str, float], matrices: Shapes) -> dict[str, float]:
    """Returns {path: cost of an error}: the square root of each sensitivity per weight, times the number of weights.

    Sensitivities are those of single errors in the original model. In the compressed one the kernels behind an error
    make good a part of it, the larger the more there is to make good: spent by their square roots, bits leave less than
    half of the divergence that they leave spent by the sensitivities themselves (docs/experiments.md).

    Args:
      sensitivities: {path: loss per unit of relative squared error}, at least those of `matrices`; >= 0.
      matrices: {path: (d_in, d_out)}.
    """
    return {path: math.sqrt(sensitivities[path] * math.prod(shape)) for path, shape in matrices.items()}


def allocate_unevenly(
    matrices: Shapes,
    costs: Mapping[str, float],
    bits: float,
    *,
    like: CompressionRule,
    by_kernel: bool,
    pools: Mapping[str, str] | None = None,
) -> dict[str, CompressionRule]:
    """Returns {path: rule} of the least sum of cost times predicted distortion within the budget.

    Args:
      matrices: {path: (d_in, d_out)}.
      costs: {path: loss per unit of relative squared error, by some measure}, at least those of `matrices`.
      bits: budget, stored bits per weight of all together, codebooks included.
      like: the rule whose pattern and axis are kept.
      by_kernel: one choice for a kernel in all blocks (paths that differ in a number only), so that blocks keep one
        shape and are compiled once.
      pools: {path: pool}; matrices of one pool that get the same (g, num_codes) have one codebook in common. None:
        every matrix has its own.

    Raises:
      ArithmeticError: no choice is within the budget; `check_reachable` tells before.
    """
    units: dict[str, list[str]] = {}
    for path in matrices:
        units.setdefault(re.sub(r"(?<=/)\d+(?=/)", "*", path) if by_kernel else path, []).append(path)
    problem = _Problem(matrices, costs, list(units.values()), pools or {path: path for path in matrices}, like.axis)
    return {
        path: CompressionRule(pattern=like.pattern, g=g, num_codes=num_codes, axis=like.axis)
        for paths, (g, num_codes) in zip(problem.units, _least_cost(problem, bits), strict=True)
        for path in paths
    }


def check_reachable(matrices: Shapes, bits: float, *, axis: Axis, pools: Mapping[str, str]) -> None:
    """Raises InputError where `allocate_unevenly` has nothing to offer that is within the budget, whatever the costs.

    Args:
      matrices, bits, pools: as there.
      axis: that is cut.
    """
    offers = _offers(bits)
    weights = sum(math.prod(shape) for shape in matrices.values())
    problem = _Problem(matrices, {}, [[path] for path in matrices], pools, axis)
    least = sum(min(_index_bits(problem, paths, *offer) for offer in offers) for paths in problem.units)
    least += len(set(pools.values())) * min(16 * g * num_codes for g, num_codes in offers)
    if least > bits * weights * (1.0 - _TOLERANCE):
        reached = math.ceil(1000 * least / weights) / 1000
        raise InputError(f"bits is {bits}; the least that mixed settings reach on this model is {reached}")


def _offers(bits: float) -> list[tuple[int, int]]:
    """Returns every (g, num_codes) that is offered for a budget of so many bits per weight."""
    least, most = _LEAST * min(bits, 8.0), bits + _ABOVE
    return [(g, 2**width) for g in _GROUPS for width in _INDEX_BITS if least <= width / g <= most]


class _Problem(NamedTuple):
    """What is to be chosen.

    Attributes:
      matrices: {path: (d_in, d_out)}.
      costs: {path: cost of an error}.
      units: the paths of those that get one choice, for every choice.
      pools: {path: pool} of those that share the codebook where they are given the same choice.
      axis: that is cut.
    """

    matrices: Shapes
    costs: Mapping[str, float]
    units: Sequence[Sequence[str]]
    pools: Mapping[str, str]
    axis: Axis


def _least_cost(problem: _Problem, bits: float) -> list[tuple[int, int]]:
    """Returns (g, num_codes) of each unit: a multiple-choice knapsack, solved by branch and bound.

    The unknowns, each 0 or 1: whether a unit takes an offer, unit by unit, then whether a pool has the codebook of an
    offer, pool by pool. A unit takes one, and its pools have that codebook.
    """
    offers = _offers(bits)
    units, names = problem.units, list(dict.fromkeys(problem.pools[path] for path in problem.matrices))
    loss = np.array([[_predicted_loss(problem, paths, *offer) for offer in offers] for paths in units])
    index = np.array([[_index_bits(problem, paths, *offer) for offer in offers] for paths in units])
    codebooks = np.tile([16 * g * num_codes for g, num_codes in offers], len(names))
    needs = np.array(sorted({(u, names.index(problem.pools[path])) for u, paths in enumerate(units) for path in paths}))
    one, each = np.ones(len(needs)), np.arange(len(needs))
    per_unit = csr_array((one, (each, needs[:, 0])), shape=(len(needs), len(units)))
    per_pool = csr_array((one, (each, needs[:, 1])), shape=(len(needs), len(names)))
    taken = kron(eye_array(len(units)), np.ones((1, len(offers))))
    once = hstack([taken, csr_array((len(units), codebooks.size))])
    had = hstack([kron(per_unit, eye_array(len(offers))), -kron(per_pool, eye_array(len(offers)))])
    budget = math.floor(bits * sum(math.prod(shape) for shape in problem.matrices.values()))
    spent = np.concatenate([index.ravel(), codebooks])
    # In shares of the budget and of the loss: numbers of bits would be far apart from the ones beside them.
    with _no_standard_output():
        solved = milp(
            np.concatenate([loss.ravel() / (loss.sum() or 1.0), np.zeros(codebooks.size)]),
            integrality=np.ones(spent.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint(had, -np.inf, 0),
                LinearConstraint(spent[None] / budget, -np.inf, 1.0 - _TOLERANCE),
            ],
            options=_ENOUGH,
        )
    if solved.x is None:
        raise ArithmeticError(f"the choice of codebooks was not solved: {solved.message}")
    return [offers[c] for c in solved.x[: loss.size].reshape(loss.shape).argmax(axis=1)]


@contextlib.contextmanager
def _no_standard_output() -> Iterator[None]:
    """Nothing reaches standard output meanwhile: HiGHS writes words of its own there, whatever it is told."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _predicted_loss(problem: _Problem, paths: Sequence[str], g: int, num_codes: int) -> float:
    """Returns the sum of cost times distortion, less where vectors are so few that codes learn them by heart."""
    distortion = predicted_distortion(g, num_codes)
    return sum(
        problem.costs[path] * distortion * max(0.5, 1.0 - _BY_HEART * num_codes * g / math.prod(problem.matrices[path]))
        for path in paths
    )


def _index_bits(problem: _Problem, paths: Sequence[str], g: int, num_codes: int) -> int:
    shapes = [problem.matrices[path] for path in paths]
    return sum(stored_bits((s[0], s[1]), g=g, num_codes=num_codes, axis=problem.axis, own=False) for s in shapes)
