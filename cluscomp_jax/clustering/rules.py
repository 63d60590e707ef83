"""Which matrices are compressed and how finely: rules by path, and the choice of (g, num_codes) for a bit budget."""

import math
import re
from collections.abc import Mapping, Sequence

from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core.coding import MAX_CODES, MAX_GROUP, Axis, Form, code_bits, stored_bits
from cluscomp_jax.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def match(rules: Sequence[CompressionRule], shapes: Shapes) -> dict[str, CompressionRule]:
    """Returns {path: first rule whose pattern matches the whole path}; what no rule matches is left out.

    Raises:
      InputError: a pattern is no regular expression, a rule matches no path at all, or none that the rules before it
        left, or it matches something that is no matrix.
    """
    compiled = []
    for rule in rules:
        try:
            compiled.append((re.compile(rule.pattern), rule))
        except re.error as error:
            raise InputError(f"rule pattern {rule.pattern!r} is not a regular expression: {error}") from error
    matched: dict[str, CompressionRule] = {}
    for pattern, rule in compiled:
        paths = [path for path in shapes if pattern.fullmatch(path)]
        if not paths:
            example = next(iter(shapes), "none")
            raise InputError(f"rule {rule.pattern!r} matches none of the {len(shapes)} parameters (one is {example!r})")
        for path in paths:
            if len(shapes[path]) != 2:
                raise InputError(
                    f"rule {rule.pattern!r} matches {path!r} of shape {shapes[path]}; only matrices are compressed"
                )
            matched.setdefault(path, rule)
        if not any(matched[path] is rule for path in paths):
            raise InputError(
                f"rule {rule.pattern!r} decides nothing: rules before it match all its {len(paths)} paths; "
                "put it before them, or leave it out"
            )
    return matched


def total_bits_per_weight(
    matrices: Shapes, *, g: int, num_codes: int, axis: Axis = "out", codebooks: int | None = None
) -> float:
    """Returns the stored bits per weight, codebooks included, of all matrices at one (g, num_codes).

    Args:
      codebooks: how many there are for all of them; None: one each.
    """
    bits = sum(stored_bits(Form((s[0], s[1]), num_codes, g, axis), own=False) for s in matrices.values())
    bits += 16 * g * num_codes * (len(matrices) if codebooks is None else codebooks)
    return bits / sum(s[0] * s[1] for s in matrices.values())


_ANY = CompressionRule()
ALL_GROUPS = range(1, MAX_GROUP + 1)


def allocate(
    matrices: Shapes,
    bits: float,
    *,
    like: CompressionRule = _ANY,
    groups: Sequence[int] = ALL_GROUPS,
    codebooks: int | None = None,
) -> CompressionRule:
    """Returns the rule that spends at most `bits` stored bits per weight on `matrices` with one (g, num_codes) for all.

    For every g the largest num_codes within the budget is a candidate; the candidate with the least distortion
    predicted by high-rate theory for a Gaussian source wins (`predicted_distortion`).

    Args:
      matrices: {path: (d_in, d_out)} of the matrices to compress.
      bits: budget, stored bits per weight: index at ceil(log2 n) bits plus 16-bit codebooks.
      like: the rule whose pattern and axis are kept.
      groups: the g to choose from.
      codebooks: how many there are for all of them; None: one each.

    Raises:
      InputError: no (g, num_codes) is that small; the least reachable is named.
    """
    if not matrices:
        raise InputError("there is no matrix to spend bits on")
    best: tuple[float, CompressionRule] | None = None
    for g in groups:
        num_codes = _largest_num_codes(matrices, bits, g=g, axis=like.axis, codebooks=codebooks)
        if num_codes is None:
            continue
        distortion = predicted_distortion(g, num_codes)
        if best is None or distortion < best[0]:
            best = distortion, CompressionRule(pattern=like.pattern, group_size=g, num_codes=num_codes, axis=like.axis)
    if best is None:
        least = min(
            total_bits_per_weight(matrices, g=g, num_codes=2, axis=like.axis, codebooks=codebooks) for g in groups
        )
        raise InputError(
            f"bits is {bits}; the least that any group size and 2 codes reach on this model is {least:.3f}"
        )
    return best[1]


def groups_for_aqlm(matrices: Shapes, *, axis: Axis) -> list[int]:
    """Returns the g that an AQLM checkpoint can hold for all of these matrices: those that divide every cut axis."""
    sides = {shape[1] if axis == "out" else shape[0] for shape in matrices.values()}
    return [g for g in ALL_GROUPS if all(side % g == 0 for side in sides)]


def _largest_num_codes(matrices: Shapes, bits: float, *, g: int, axis: Axis, codebooks: int | None) -> int | None:
    """Returns the largest num_codes in 2…65536 within the budget, or None. Bits grow with num_codes."""
    low, high = 1, MAX_CODES
    while low < high:
        middle = (low + high + 1) // 2
        if total_bits_per_weight(matrices, g=g, num_codes=middle, axis=axis, codebooks=codebooks) <= bits:
            low = middle
        else:
            high = middle - 1
    return low if low >= 2 else None


_NORMALISED_SECOND_MOMENT = {
    1: 0.08333,
    2: 0.08019,
    3: 0.07854,
    4: 0.07660,
    5: 0.07562,
    6: 0.07424,
    7: 0.07312,
    8: 0.07168,
}
"""Best known lattices (Conway and Sloane, Sphere Packings, Lattices and Groups, table 2.3)."""


_TAILS = (1.20, 1.11, 1.05, 1.01, 0.97, 0.93, 0.91, 0.90)
"""Measured over predicted error at g = 1 to 8, k-means on four matrices of SmolLM2-135M (docs/experiments.md): weights
have heavier tails than a Gaussian, which costs short vectors most, and few enough codes gain on the lattice bound."""


def predicted_distortion(g: int, num_codes: int) -> float:
    """Returns the relative squared error of n codes on g-vectors of weights: Zador's formula, corrected for tails.

    D = G_g n^(-2/g) 2 pi ((g+2)/g)^((g+2)/2) for a Gaussian, with G_g of the best known lattice up to g = 8 and Zador's
    lower bound Gamma(g/2+1)^(2/g) / ((g+2) pi) above; never more than 1, the error of a single code.
    """
    sphere = math.gamma(g / 2 + 1) ** (2 / g) / ((g + 2) * math.pi)
    moment = _NORMALISED_SECOND_MOMENT.get(g, sphere)
    gaussian = 2 * math.pi * ((g + 2) / g) ** ((g + 2) / 2)
    return min(1.0, float(_TAILS[min(g, len(_TAILS)) - 1] * moment * gaussian * num_codes ** (-2 / g)))


def describe(rule: CompressionRule) -> str:
    """Returns "g=4, n=1024 (10-bit index)" or "g=2, n=1024 (trellis, 4 bits per code)"."""
    index = f"{code_bits(rule.num_codes)}-bit index"
    if rule.step_bits is not None:
        index = f"trellis, {rule.step_bits} bits per code"
    return f"g={rule.group_size}, n={rule.num_codes} ({index})"
