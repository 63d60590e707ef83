"""A bit budget spent to the end: the setting of each matrix, of nearly the least predicted loss.

One setting for all matrices leaves up to a step of a budget unspent; a step is half a bit a weight for a trellis. Here
every matrix begins with the fewest bits. The next setting goes to the matrix whose loss falls most for a bit, until
nothing fits any more. Among equals all of one projection come before the next, and the first blocks before the last, so
that blocks differ at few places only.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from cluscomp_jax.clustering.rules import predicted_distortion
from cluscomp_jax.config.clustering import BudgetCoding, CompressionRule
from cluscomp_jax.core.coding import stored_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.trellis.distortion import TRELLIS_DISTORTION

Shapes = Mapping[str, tuple[int, ...]]
Offer = tuple[int, int, int | None]
"""(group_size, num_codes, step_bits)."""

_PLAIN_GROUPS, _PLAIN_BITS = range(1, 9), range(1, 17)
_SINGLE = 1.02
"""The error of a trellis of single weights, times this, is compared: it takes twice the steps to find and to decode."""
_LEAST, _ABOVE = 0.5, 1.5
"""With costs, index bits per weight are offered from this share of the budget to so many above it. With fewer, errors
are as large as weights, of which a prediction to second order knows nothing."""
_WORDS = {"plain": "plain", "trellis": "trellis", "auto": "any"}


class _Choice(NamedTuple):
    """What one setting costs and leaves of a matrix: `error` is the sum over its weights."""

    bits: int
    error: float
    rule: CompressionRule


class _Step(NamedTuple):
    """The change of an item from one setting to a better one."""

    saved_per_bit: float
    bits: int
    level: int
    item: str


def offers(coding: BudgetCoding) -> list[Offer]:
    """Returns the settings of a coding: "plain", "trellis", or "auto" for both."""
    plain: list[Offer] = [(g, 2**bits, None) for g in _PLAIN_GROUPS for bits in _PLAIN_BITS]
    trellis: list[Offer] = list(TRELLIS_DISTORTION)
    return {"plain": plain, "trellis": trellis, "auto": plain + trellis}[coding]


def distortion_of(offer: Offer) -> float:
    """Returns the relative squared error of a setting that is compared, measured for a trellis."""
    g, n, step_bits = offer
    if step_bits is None:
        return predicted_distortion(g, n)
    return TRELLIS_DISTORTION[g, n, step_bits] * (_SINGLE if g == 1 else 1.0)


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


def allocate_bits(
    matrices: Shapes,
    bits: float,
    *,
    like: CompressionRule,
    coding: BudgetCoding = "auto",
    costs: Mapping[str, float] | None = None,
    projection: Callable[[str], str] = str,
    unit: Callable[[str], str] = str,
    alike: bool = False,
) -> dict[str, CompressionRule]:
    """Returns {path: rule}, of nearly the least sum of cost times relative squared error within the budget.

    Args:
      matrices: {path: (d_in, d_out)}, block by block.
      bits: budget, stored bits per weight of all together, codebooks included.
      like: the rule whose pattern and axis are kept.
      coding: "plain", "trellis" or "auto".
      costs: {path: loss per unit of relative squared error, by some measure, >= 0}; None: its number of weights, so
        that the error of every weight costs the same.
      projection: what a path has in common with the same matrix of other blocks.
      unit: what a path has in common with those of its block that get the same.
      alike: all blocks get the same.

    Raises:
      InputError: no setting is that small; the least reachable is named.
    """
    if not matrices:
        raise InputError("there is no matrix to spend bits on")
    items: dict[str, list[str]] = {}
    for path in matrices:
        items.setdefault(projection(path) if alike else unit(path), []).append(path)
    weights = sum(math.prod(shape) for shape in matrices.values())
    budget = math.floor(bits * weights)
    hulls_of, least_of = partial(_hulls, matrices, like), partial(_least_bits, matrices)
    hulls = hulls_of(offers(coding))
    if least_of(hulls) > budget:
        least = math.ceil(1e3 * least_of(hulls) / weights) / 1e3
        raise InputError(f"bits is {bits}; the least that {_WORDS[coding]} codes reach on this model is {least}")
    if costs is not None:
        near = [offer for offer in offers(coding) if _LEAST * bits <= index_rate(offer) <= bits + _ABOVE]
        limited = hulls_of(near) if near else hulls
        hulls = limited if least_of(limited) <= budget else hulls
    of = {item: hulls[matrices[paths[0]]] for item, paths in items.items()}
    cost = {item: _cost_per_weight(matrices, paths, costs) for item, paths in items.items()}
    order = list(dict.fromkeys(projection(path) for path in matrices))
    rank = {item: (order.index(projection(paths[0])), place) for place, (item, paths) in enumerate(items.items())}
    steps = [step for item, paths in items.items() for step in _steps(item, of[item], len(paths), cost[item])]
    level, spent = dict.fromkeys(items, 0), least_of(hulls)
    for step in sorted(steps, key=lambda step: (-step.saved_per_bit, *rank[step.item], step.level)):
        if step.level == level[step.item] + 1 and spent + step.bits <= budget:
            level[step.item], spent = step.level, spent + step.bits
    return {path: of[item][level[item]].rule for item, paths in items.items() for path in paths}


def index_rate(offer: Offer) -> float:
    """Returns the bits of the index for a weight."""
    g, n, step_bits = offer
    return (math.log2(n) if step_bits is None else step_bits) / g


def _hulls(matrices: Shapes, like: CompressionRule, choices: Sequence[Offer]) -> dict[tuple[int, ...], list[_Choice]]:
    by_rate: dict[float, list[Offer]] = {}
    for offer in choices:
        by_rate.setdefault(index_rate(offer), []).append(offer)

    def best(shape: tuple[int, ...], alike: Sequence[Offer]) -> _Choice:
        # A bit a weight quarters the error. So this is the best of one rate, whatever an error costs.
        made = [_choice(shape, offer, like) for offer in alike]
        return min(made, key=lambda choice: math.log2(choice.error) + 2 * choice.bits / math.prod(shape))

    shapes = sorted(set(matrices.values()))
    return {shape: _hull([best(shape, alike) for alike in by_rate.values()]) for shape in shapes}


def _least_bits(matrices: Shapes, hulls: Mapping[tuple[int, ...], list[_Choice]]) -> int:
    return sum(hulls[shape][0].bits for shape in matrices.values())


def _cost_per_weight(matrices: Shapes, paths: Sequence[str], costs: Mapping[str, float] | None) -> float:
    return 1.0 if costs is None else sum(costs[path] for path in paths) / sum(math.prod(matrices[p]) for p in paths)


def _choice(shape: tuple[int, ...], offer: Offer, like: CompressionRule) -> _Choice:
    g, n, step_bits = offer
    rule = CompressionRule(pattern=like.pattern, group_size=g, num_codes=n, axis=like.axis, step_bits=step_bits)
    bits = stored_bits(rule.form((shape[0], shape[1])), rule.coding)
    return _Choice(bits, distortion_of(offer) * math.prod(shape), rule)


def _hull(choices: Sequence[_Choice]) -> list[_Choice]:
    """Returns the choices on the lower convex hull of error over bits, from the fewest bits on."""
    hull: list[_Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.bits, choice.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(one: _Choice, other: _Choice) -> float:
    return (one.error - other.error) / (other.bits - one.bits)


def _steps(item: str, hull: Sequence[_Choice], count: int, cost: float) -> Iterator[_Step]:
    for level in range(1, len(hull)):
        before, after = hull[level - 1], hull[level]
        yield _Step(cost * _slope(before, after), count * (after.bits - before.bits), level, item)
