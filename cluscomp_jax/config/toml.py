"""Strict TOML for settings: every key must be one that somebody reads. Knows no settings by name."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cluscomp_jax.errors import InputError


def read_toml(path: str | Path) -> dict[str, Any]:
    """Returns the tables of a TOML file.

    Raises:
      InputError: no such file, or not UTF-8 TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config {path}: not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"config {path}: not valid TOML: {error}") from error


def overlay(base: Any, fields: Mapping[str, Any], where: str = "", others: Sequence[str] = ()) -> Any:
    """Returns the dataclass `base` with `fields` in place of its values, checked by its annotations.

    A field named "model" is the caller's alone: no file can set it. `others` are keys that the caller has read already.

    Raises:
      InputError: a key that is no field, or a value of the wrong type or range; `where` precedes its name.
    """
    hints = typing.get_type_hints(type(base))
    known = [field.name for field in dataclasses.fields(base) if field.name != "model"]
    changes = {}
    for key, value in fields.items():
        name = f"{where}{key}"
        if key not in known:
            raise InputError(f"key {name!r} is not known; known here: {', '.join([*others, *known])}")
        changes[key] = _coerce(hints[key], value, getattr(base, key), name)
    return dataclasses.replace(base, **changes)


def _coerce(hint: Any, value: Any, current: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        hint = next(argument for argument in arguments if argument is not type(None))
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{name!r} is {value!r}; it must be a table")
        return overlay(current if current is not None else hint(), value, f"{name}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{name!r} is {value!r}; it must be a list")
        element = arguments[0]
        return tuple(_coerce(element, item, None, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{name!r} is {value!r}; it must be one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{name!r} is {value!r}; it must be {hint.__name__}")
    return value
