"""What a setting may be: one line that names it, its value and what is legal."""

import math
import re

from cluscomp_jax.errors import InputError


def require(holds: bool, name: str, value: object, legal: str) -> None:
    """Raises InputError unless `holds`: setting `name` is `value`, which must be `legal`."""
    if not holds:
        raise InputError(f"{name} is {value!r}; it must be {legal}")


def require_finite(name: str, value: float, *, low: float, high: float = math.inf) -> None:
    """Raises InputError unless `value` is a finite number from `low` to `high`."""
    require(math.isfinite(value) and low <= value <= high, name, value, f"a number from {low} to {high}")


def require_pattern(name: str, pattern: str) -> None:
    """Raises InputError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{name} holds {pattern!r}, which is no regular expression: {error}") from None
