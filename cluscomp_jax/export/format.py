"""What an export format is: a row of the table in `export/__init__.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cluscomp_jax.checkpoint.reader import CheckpointSource

DEFAULT_SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one safetensors file."""


class ExportOptions(NamedTuple):
    """How to write. None is the format's own choice.

    Attributes:
      dtype: "float32", "float16" or "bfloat16" for all tensors of a decoded format; None: each in its own.
      code_bits: of an AQLM code, see `aqlm.scheme_of`.
      shard_bytes: most bytes of tensors in one safetensors file; above 0. None: DEFAULT_SHARD_BYTES.
    """

    dtype: str | None = None
    code_bits: int | None = None
    shard_bytes: int | None = None


class Format(NamedTuple):
    """A format.

    Attributes:
      write: (source, folder, options) -> None writes all files but the model card into an existing, empty folder.
      options: names of the ExportOptions that have an effect on it.
      usage: the model card's text on how to load it.
      nested_usage: the same of a text model with what is carried along around it; None: the text model alone is
        exported.
    """

    write: Callable[[CheckpointSource, Path, ExportOptions], None]
    options: frozenset[str]
    usage: str
    nested_usage: str | None = None
