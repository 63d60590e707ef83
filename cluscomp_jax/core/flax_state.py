"""CodebookArrays for flax.serialization, without importing flax.

flax asks the type of a leaf for its state, in a table of its own. It is entered there when a CodebookArray is made and
flax has been imported. Where the arrays were made first, the next one enters it: any `jax.tree.map` makes one.
"""

import dataclasses
import sys
from typing import Any

from cluscomp_jax.errors import InputError

_NAMES = ("codebook", "index")


def register(kind: type) -> None:
    """Enters `kind`, the class CodebookArray, in flax's table, once and where flax.serialization is imported."""
    flax = sys.modules.get("flax.serialization")
    if flax is not None and not flax.is_serializable(kind):
        flax.register_serialization_state(kind, _to_state, _from_state)


def _to_state(w: Any) -> dict[str, Any]:
    """Returns the arrays of a CodebookArray; what is static comes from the target of `from_state_dict`."""
    from flax import serialization

    return {name: serialization.to_state_dict(getattr(w, name)) for name in _NAMES}


def _from_state(target: Any, state: Any) -> Any:
    """Returns the target with the arrays of a state.

    Raises:
      InputError: the state has other names or shapes.
    """
    from flax import serialization

    where = serialization.current_path()
    if not isinstance(state, dict) or set(state) != set(_NAMES):
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{where}: the state of a CodebookArray has {', '.join(_NAMES)}; found {found}")
    parts = {}
    for name in _NAMES:
        here, there = getattr(target, name), state[name]
        if getattr(here, "shape", None) != getattr(there, "shape", None):
            shapes = (getattr(part, "shape", None) for part in (there, here))
            raise InputError("{}/{}: the state has shape {}, the target {}".format(where, name, *shapes))
        parts[name] = serialization.from_state_dict(here, there, name=name)
    return dataclasses.replace(target, **parts)
