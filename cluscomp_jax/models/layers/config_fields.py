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
    if not _is_number(value):
        raise InputError(f"config: {name} is {short(value)}; it must be a finite number")
    return float(value)


def optional_number(fields: Mapping[str, Any], name: str, default: float | None) -> float | None:
    """Returns the number `name` as a float, the default if absent; unlike elsewhere a null is None."""
    if name in fields and fields[name] is None:
        return None
    return default if name not in fields else number(fields, name)


def numbers(fields: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Returns the list of finite numbers `name` as floats."""
    value = _value(fields, name, _REQUIRED)
    if not isinstance(value, list | tuple) or not all(_is_number(one) for one in value):
        raise InputError(f"config: {name} is {short(value)}; it must be a list of finite numbers")
    return tuple(float(one) for one in value)


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


def texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """Returns the list of strings `name`, None if absent."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise InputError(f"config: {name} is {short(value)}; it must be a list of strings")
    return tuple(value)


def short(value: Any) -> str:
    """Returns repr(value), cut to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _value(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        value = default
    if value is _REQUIRED:
        raise InputError(f"config: {name} is missing")
    return value
