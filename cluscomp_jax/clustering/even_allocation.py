"""A bit budget spent to the end: the setting of each matrix, all errors weighing the same.

Settings come in steps; half a bit a weight for a trellis. One setting for all matrices leaves up to a step of a budget
unspent. Here some matrices get the next setting, those first whose error falls most for a bit. Among equals all of one
projection come before the next, and the first blocks before the last, so that blocks differ at few places only.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cluscomp_jax.clustering.rules import predicted_distortion
from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core.coding import stored_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.trellis.distortion import TRELLIS_DISTORTION

Shapes = Mapping[str, tuple[int, ...]]
Offer = tuple[int, int, int | None]
"""(group_size, num_codes, step_bits)."""

_PLAIN_GROUPS, _PLAIN_BITS = range(1, 9), range(1, 17)
_SINGLE = 1.02
"""The error of a trellis of single weights, times this, is compared: it takes twice the steps to find and to decode."""
_WORDS = {"plain": "plain", "trellis": "trellis", "auto": "any"}


class _Choice(NamedTuple):
    """What one setting costs and leaves of a matrix."""

    bits: int
    error: float
    rule: CompressionRule


class _Step(NamedTuple):
    """The change of an item from one setting to a better one."""

    saved_per_bit: float
    bits: int
    level: int
    item: str


def offers(coding: str) -> list[Offer]:
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


def allocate_evenly(
    matrices: Shapes,
    bits: float,
    *,
    like: CompressionRule,
    coding: str = "auto",
    projection: Callable[[str], str] = str,
    alike: bool = False,
) -> dict[str, CompressionRule]:
    """Returns {path: rule}, of nearly the least sum of error times weights within the budget.

    Args:
      matrices: {path: (d_in, d_out)}, block by block.
      bits: budget, stored bits per weight of all together, codebooks included.
      like: the rule whose pattern and axis are kept.
      coding: "plain", "trellis" or "auto".
      projection: what a path has in common with the same matrix of other blocks.
      alike: all blocks get the same.

    Raises:
      InputError: no setting is that small; the least reachable is named.
    """
    items: dict[str, list[str]] = {}
    for path in matrices:
        items.setdefault(projection(path) if alike else path, []).append(path)
    weights = sum(math.prod(shape) for shape in matrices.values())
    budget, hulls = math.floor(bits * weights), dict[tuple[int, ...], list[_Choice]]()
    for shape in matrices.values():
        if shape not in hulls:
            hulls[shape] = _hull([_choice(shape, offer, like) for offer in offers(coding)])
    of = {item: hulls[matrices[paths[0]]] for item, paths in items.items()}
    spent = sum(of[item][0].bits * len(paths) for item, paths in items.items())
    if spent > budget:
        least = math.ceil(1e3 * spent / weights) / 1e3
        raise InputError(f"bits is {bits}; the least that {_WORDS[coding]} codes reach on this model is {least}")
    order = list(dict.fromkeys(projection(path) for path in matrices))
    rank = {item: (order.index(projection(paths[0])), place) for place, (item, paths) in enumerate(items.items())}
    level = dict.fromkeys(items, 0)
    steps = [step for item, paths in items.items() for step in _steps(item, of[item], len(paths))]
    for step in sorted(steps, key=lambda step: (-step.saved_per_bit, *rank[step.item], step.level)):
        if step.level == level[step.item] + 1 and spent + step.bits <= budget:
            level[step.item], spent = step.level, spent + step.bits
    return {path: of[item][level[item]].rule for item, paths in items.items() for path in paths}


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


def _steps(item: str, hull: Sequence[_Choice], count: int) -> Iterator[_Step]:
    for level in range(1, len(hull)):
        before, after = hull[level - 1], hull[level]
        yield _Step(_slope(before, after), count * (after.bits - before.bits), level, item)
