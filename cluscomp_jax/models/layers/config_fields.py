"""Typed reading of single fields of a config mapping, each with one clear error. Knows no family.

A null counts as absent. Every function raises InputError, naming field and value, where the type is wrong or
a field without default is missing.
"""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.errors import InputError

_REQUIRED = object()


def integer(fields: Mapping[str, Any], name: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
    """Returns the integer `name`, at least `least`."""
    value = _value(fields, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"config: {name} is {short(value)}; it must be an integer of at least {least}")
    return value


def number(fields: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> float:
    """Returns the integer or floating-point number `name` as a float; infinities and NaN are refused."""
    value = _value(fields, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
        raise InputError(f"config: {name} is {short(value)}; it must be a finite number")
    return float(value)


def flag(fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Returns the truth value `name`."""
    value = _value(fields, name, default)
    if not isinstance(value, bool):
        raise InputError(f"config: {name} is {short(value)}; it must be true or false")
    return value


def text(fields: Mapping[str, Any], name: str, default: str) -> str:
    """Returns the string `name`."""
    value = _value(fields, name, default)
    if not isinstance(value, str):
        raise InputError(f"config: {name} is {short(value)}; it must be a string")
    return value


def tokens(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Returns the token numbers `name`, () if absent; one number counts as a list of one."""
    value = fields.get(name)
    values = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
        raise InputError(f"config: {name} is {short(value)}; it must be a token number or a list of them")
    return tuple(values)


def token(fields: Mapping[str, Any], name: str) -> int | None:
    """Returns the token number `name`, None if absent."""
    found = tokens(fields, name)
    if len(found) > 1:
        raise InputError(f"config: {name} is {short(fields[name])}; it must be one token number")
    return found[0] if found else None


def short(value: Any) -> str:
    """Returns repr(value), cut to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _value(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        value = default
    if value is _REQUIRED:
        raise InputError(f"config: {name} is missing")
    return value
