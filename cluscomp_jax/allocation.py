"""Bits where they count: (g, num_codes) by matrix under one budget, the least predicted loss exactly."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from cluscomp_jax.codebook import Axis, stored_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.rules import predicted_distortion
from cluscomp_jax.settings import CompressionRule

_GROUPS = (1, 2, 3, 4, 6, 8)
"""Weights per code that are offered: what lies between them or beyond buys less than half a percent."""
_INDEX_BITS = range(2, 17)
_BY_HEART = 2.0
"""Share of the error that is saved for every code per vector; measured: 2 to 4."""
_TOLERANCE = 2e-6
"""Share of the budget that is left over, above what the solver may overlook."""


class _Choice(NamedTuple):
    """What one (g, num_codes) costs a set of matrices."""

    g: int
    num_codes: int
    bits: int
    distortion: float


def allocate_unevenly(
    matrices: Mapping[str, tuple[int, ...]],
    sensitivities: Mapping[str, float],
    bits: float,
    *,
    like: CompressionRule,
    by_kernel: bool,
) -> dict[str, CompressionRule]:
    """Returns {path: rule} of the least sum of sensitivity times predicted distortion within the budget.

    Args:
      matrices: {path: (d_in, d_out)}.
      sensitivities: {path: loss per unit of relative squared error}, at least those of `matrices`.
      bits: budget, stored bits per weight of all together, codebooks included.
      like: the rule whose pattern and axis are kept.
      by_kernel: one choice for a kernel in all blocks (paths that differ in a number only), so that blocks keep one
        shape and are compiled once.

    Raises:
      InputError: the budget is below the least that can be offered.
    """
    groups: dict[str, list[str]] = {}
    for path in matrices:
        groups.setdefault(re.sub(r"(?<=/)\d+(?=/)", "*", path) if by_kernel else path, []).append(path)
    sizes = {path: (shape[0], shape[1]) for path, shape in matrices.items()}
    offers = [_offers([sizes[path] for path in paths], axis=like.axis) for paths in groups.values()]
    costs = [sum(sensitivities[path] for path in paths) for paths in groups.values()]
    weights = sum(math.prod(size) for size in sizes.values())
    budget = math.floor(bits * weights)
    least = sum(min(offer.bits for offer in offered) for offered in offers)
    if least > budget * (1 - _TOLERANCE):
        raise InputError(f"bits is {bits}; the least that mixed settings reach on this model is {least / weights:.3f}")
    chosen = _cheapest(offers, costs, budget)
    return {
        path: CompressionRule(pattern=like.pattern, g=offer.g, num_codes=offer.num_codes, axis=like.axis)
        for paths, offer in zip(groups.values(), chosen, strict=True)
        for path in paths
    }


def _offers(sizes: Sequence[tuple[int, int]], *, axis: Axis) -> list[_Choice]:
    """Returns the settings that no other one beats in both bits and distortion, by rising bits."""
    every = sorted(
        (
            _Choice(
                g,
                2**width,
                sum(stored_bits(size, g=g, num_codes=2**width, axis=axis) for size in sizes),
                _on_matrices(sizes, g, 2**width),
            )
            for g in _GROUPS
            for width in _INDEX_BITS
        ),
        key=lambda choice: (choice.bits, choice.distortion),
    )
    offers: list[_Choice] = []
    for choice in every:
        if not offers or choice.distortion < offers[-1].distortion:
            offers.append(choice)
    return offers


def _on_matrices(sizes: Sequence[tuple[int, int]], g: int, num_codes: int) -> float:
    """Returns the predicted distortion, less where the vectors are so few that the codes learn them by heart."""
    vectors = min(math.prod(size) for size in sizes) / g
    return predicted_distortion(g, num_codes) * max(0.5, 1.0 - _BY_HEART * num_codes / vectors)


def _cheapest(offers: Sequence[Sequence[_Choice]], costs: Sequence[float], budget: int) -> list[_Choice]:
    """Returns one offer per group: a multiple-choice knapsack, solved by branch and bound."""
    flat = [(group, offer) for group, offered in enumerate(offers) for offer in offered]
    scale = sum(costs) or 1.0
    loss = np.array([costs[group] / scale * offer.distortion for group, offer in flat])
    rows = np.array([group for group, _ in flat])
    once = coo_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(offers), len(flat)))
    # In shares of the budget: numbers of bits would be far apart from the ones beside them.
    spent = np.array([[offer.bits / budget for _, offer in flat]])
    solved = milp(
        loss,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(spent, -np.inf, 1.0 - _TOLERANCE)],
        options={"mip_rel_gap": 1e-6},
    )
    if solved.x is None:
        raise ArithmeticError(f"the choice of codebooks was not solved: {solved.message}")
    return [offer for (_, offer), taken in zip(flat, solved.x, strict=True) if taken > 0.5]
