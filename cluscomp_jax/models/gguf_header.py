"""What a GGUF header says of a model, as a family reads it into the fields of a config.json. Knows no files.

GGUF has metadata in float32, so 1e-05 reads back as 9.999999747378752e-06; `shortest_decimal` gives 1e-05 again.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cluscomp_jax.errors import InputError


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32.

    >>> shortest_decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))


def number_of(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Returns one number of a header as it is stored; an array of equal ones counts as one.

    Raises:
      InputError: there is none and no default, or it is no number.
    """
    value = metadata.get(key, default)
    if value is None:
        raise InputError(f"the GGUF header has no {key}")
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key} in the GGUF header is {str(value)[:60]}; one number for all blocks is expected")
    return value


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """A header, its keys without the architecture that precedes them.

    Attributes:
      architecture: general.architecture.
      metadata: {whole key: value}.
      shapes: {tensor name: row-major shape}.
      read: read(tensor name) -> float32 array, for the small tensors that are part of a config.
      fields: the fields of config.json that all architectures have.
    """

    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    fields: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Returns whether the header has the key."""
        return f"{self.architecture}.{key}" in self.metadata

    def number(self, key: str, default: float | None = None) -> float | int:
        """Returns `number_of` a key, a float as the shortest decimal. Raises as that does."""
        value: float | int = number_of(self.metadata, f"{self.architecture}.{key}", default)
        return value if isinstance(value, int) else shortest_decimal(value)

    def bias(self, module: str) -> bool:
        """Returns whether the first block's tensor `module` has a bias."""
        return f"blk.0.{module}.bias" in self.shapes
