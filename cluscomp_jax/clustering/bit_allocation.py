"""Mixed precision: (g, num_codes) of each matrix under one bit budget, of the least predicted loss."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack, kron

from cluscomp_jax.clustering.rules import predicted_distortion
from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core.coding import Axis, Form, stored_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime.suppress_output import silenced

Shapes = Mapping[str, tuple[int, ...]]

_GROUPS = (1, 2, 3, 4, 6, 8)
"""Weights per code that are offered: others, between them or larger, gain less than half a percent."""
_INDEX_BITS = range(2, 17)
_LEAST, _ABOVE = 0.5, 1.5
"""Index bits per weight that are offered: from this share of the budget, unless codebooks leave less, to so many above.
With fewer, errors are as large as weights, of which a prediction to second order knows nothing."""
_BY_HEART = 2.0
"""Share of the error that is saved for every code per vector, because codes then learn vectors by heart (overfit);
measured: 2 to 4."""
_ENOUGH = {"mip_rel_gap": 1e-3, "node_limit": 200}
"""When branch and bound ends: near the least, or where so many costs are equal that it would count through them all."""
_TOLERANCE = 2e-6
"""Share of the budget that is left over, above what the solver may overlook."""


def tempered(sensitivities: Mapping[str, float], matrices: Shapes) -> dict[str, float]:
    """Returns {path: cost of an error}: the square root of each sensitivity per weight, times the number of weights.

    Sensitivities are those of single errors in the original model. In the compressed one the kernels after an error
    compensate a part of it, and the larger the error, the larger the part. Bits spent by the square roots leave less
    than half of the divergence of bits spent by the sensitivities themselves (docs/experiments.md).

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
    pools: Mapping[str, str] | None = None,
) -> dict[str, CompressionRule]:
    """Returns {path: rule} of the least sum of cost times predicted distortion within the budget.

    Args:
      matrices: {path: (d_in, d_out)}.
      costs: {path: loss per unit of relative squared error, by some measure}, at least those of `matrices`.
      bits: budget, stored bits per weight of all together, codebooks included.
      like: the rule whose pattern and axis are kept.
      pools: {path: pool}; matrices of one pool that get the same (g, num_codes) have one codebook in common. None:
        every matrix has its own.

    Raises:
      ArithmeticError: no choice is within the budget; `check_reachable` finds that out beforehand.
    """
    problem = _problem(matrices, pools, like.axis)
    return {
        path: CompressionRule(pattern=like.pattern, group_size=g, num_codes=num_codes, axis=like.axis)
        for paths, (g, num_codes) in zip(problem.units, _least_cost(problem, costs, bits), strict=True)
        for path in paths
    }


def check_reachable(matrices: Shapes, bits: float, *, axis: Axis, pools: Mapping[str, str] | None = None) -> None:
    """Raises InputError where `allocate_unevenly` offers nothing within the budget, whatever the costs.

    Args:
      matrices: {path: (d_in, d_out)}.
      bits: as there.
      axis: that is cut.
      pools: as there.
    """
    problem = _problem(matrices, pools, axis)
    least = _least_bits(_system(problem, _offers(bits, least=0.0))) / _weights(matrices)
    if least > bits * (1.0 - _TOLERANCE):
        reached = math.ceil(1000 * least / (1.0 - 2 * _TOLERANCE)) / 1000
        raise InputError(f"bits is {bits}; the least that mixed settings reach on this model is {reached}")


def _offers(bits: float, *, least: float) -> list[tuple[int, int]]:
    """Returns every (g, num_codes) with index bits per weight from `least` to the most for a budget of `bits`."""
    return [(g, 2**width) for g in _GROUPS for width in _INDEX_BITS if least <= width / g <= bits + _ABOVE]


class _Problem(NamedTuple):
    """The choice to be made.

    Attributes:
      matrices: {path: (d_in, d_out)}.
      units: the paths of those that get one choice, for every choice.
      pools: {path: pool} of those that share the codebook where they are given the same choice.
      axis: that is cut.
    """

    matrices: Shapes
    units: Sequence[Sequence[str]]
    pools: Mapping[str, str]
    axis: Axis


def _problem(matrices: Shapes, pools: Mapping[str, str] | None, axis: Axis) -> _Problem:
    return _Problem(matrices, [(path,) for path in matrices], pools or {path: path for path in matrices}, axis)


class _System(NamedTuple):
    """The problem in unknowns that are 0 or 1: whether a unit takes an offer, unit by unit; then whether a pool has the
    codebook of an offer, pool by pool.

    Attributes:
      bits: of each unknown that is 1.
      rules: a unit takes one offer, and its pools have that codebook.
    """

    bits: np.ndarray
    rules: Sequence[LinearConstraint]


def _system(problem: _Problem, offers: Sequence[tuple[int, int]]) -> _System:
    units, names = problem.units, list(dict.fromkeys(problem.pools[path] for path in problem.matrices))
    number = {name: i for i, name in enumerate(names)}
    needs = np.array(sorted({(u, number[problem.pools[path]]) for u, paths in enumerate(units) for path in paths}))
    one, each, of_offers = np.ones(len(needs)), np.arange(len(needs)), eye_array(len(offers))
    of_units = csr_array((one, (each, needs[:, 0])), shape=(len(needs), len(units)))
    of_pools = csr_array((one, (each, needs[:, 1])), shape=(len(needs), len(names)))
    taken = kron(eye_array(len(units)), np.ones((1, len(offers))))
    index = [_index_bits(problem, paths, *offer) for paths in units for offer in offers]
    codebooks = [16 * g * num_codes for _ in names for g, num_codes in offers]
    rules = [
        LinearConstraint(hstack([taken, csr_array((len(units), len(codebooks)))]), 1, 1),
        LinearConstraint(hstack([kron(of_units, of_offers), -kron(of_pools, of_offers)]), -np.inf, 0),
    ]
    return _System(np.array([*index, *codebooks], np.float64), rules)


def _minimised(system: _System, objective: np.ndarray, budget: float | None) -> np.ndarray:
    """Returns the unknowns, rounded, of nearly the least objective within a budget of bits, by branch and bound."""
    # In shares of the budget: numbers of bits are many orders of magnitude above the 1s of the other rules.
    within = [] if budget is None else [LinearConstraint(system.bits[None] / budget, -np.inf, 1.0 - _TOLERANCE)]
    with silenced(1):  # HiGHS prints messages of its own, whatever its options
        solved = milp(
            objective,
            integrality=np.ones(len(objective)),
            bounds=Bounds(0, 1),
            constraints=[*system.rules, *within],
            options=_ENOUGH,
        )
    if solved.x is None:
        raise ArithmeticError(f"the choice of codebooks was not solved: {solved.message}")
    rounded: np.ndarray = np.round(solved.x)
    return rounded


def _least_bits(system: _System) -> float:
    return float(system.bits @ _minimised(system, system.bits / system.bits.max(), None))


def _least_cost(problem: _Problem, costs: Mapping[str, float], bits: float) -> list[tuple[int, int]]:
    """Returns (g, num_codes) of each unit: a multiple-choice knapsack whose items share costs."""
    budget = math.floor(bits * _weights(problem.matrices))
    offers = _offers(bits, least=_LEAST * min(bits, 8.0))
    system = _system(problem, offers)
    if _least_bits(system) > budget * (1.0 - _TOLERANCE):  # codebooks take so much that indices must have less
        offers = _offers(bits, least=0.0)
        system = _system(problem, offers)
    loss = np.array([[_predicted_loss(problem, costs, paths, *offer) for offer in offers] for paths in problem.units])
    objective = np.zeros(len(system.bits))
    objective[: loss.size] = loss.ravel() / (loss.sum() or 1.0)
    chosen = _minimised(system, objective, budget)
    return [offers[c] for c in chosen[: loss.size].reshape(loss.shape).argmax(axis=1)]


def _weights(matrices: Shapes) -> int:
    return sum(math.prod(shape) for shape in matrices.values())


def _predicted_loss(
    problem: _Problem, costs: Mapping[str, float], paths: Sequence[str], g: int, num_codes: int
) -> float:
    """Returns the sum of cost times distortion, less where vectors are so few that codes learn them by heart."""
    distortion = predicted_distortion(g, num_codes)
    return sum(
        costs[path] * distortion * max(0.5, 1.0 - _BY_HEART * num_codes * g / math.prod(problem.matrices[path]))
        for path in paths
    )


def _index_bits(problem: _Problem, paths: Sequence[str], g: int, num_codes: int) -> int:
    shapes = [problem.matrices[path] for path in paths]
    return sum(stored_bits(Form((s[0], s[1]), num_codes, g, problem.axis), own=False) for s in shapes)
