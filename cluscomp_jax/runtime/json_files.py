"""JSON as checkpoints keep it: strict when read, plain when written, and a digest of its content. Knows no format."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime.lfs_pointer import refuse_lfs_pointer

MAX_JSON_BYTES = 1 << 28


def plain(value: Any, where: str) -> Any:
    """Returns `value` as JSON values that read back equal: dicts with string keys, lists, str, bool, int, float, None.

    NumPy and JAX scalars and arrays become numbers and lists, paths strings, dataclasses dicts. A float that is not
    finite, for which JSON has no word, becomes None.

    Raises:
      InputError: a value of any other type; `where` names it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    raise InputError(
        f"{where} is a {type(value).__name__}; a checkpoint's JSON takes numbers, strings, lists and dicts"
    )


def dumps(fields: Mapping[str, Any]) -> str:
    """Returns the text of a JSON object for people to read, with a line feed at its end."""
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def digest(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256, in hex, of what the object says, whatever the order of its keys and its white space."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_object(path: Path, *, foreign: bool = False) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: the file.
      foreign: another program wrote it, which may write Infinity and NaN as Python's json does.

    Raises:
      InputError: the file cannot be read, is larger than MAX_JSON_BYTES, or is not one UTF-8 JSON object with
        distinct keys and, unless it is foreign, finite numbers.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        if path.is_file():
            refuse_lfs_pointer(path)
        strict: dict[str, Any] = {} if foreign else {"parse_constant": _refuse_constant, "parse_float": _finite}
        fields = json.loads(path.read_bytes(), object_pairs_hook=_distinct, **strict)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not the JSON it should be: {error}; the file is damaged or not ours") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds a JSON {type(fields).__name__}; it must hold an object")
    return fields


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"a key appears twice among {sorted(key for key, _ in pairs)[:8]}")
    return fields


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is beyond the range of a double")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
