"""How one parameter is stored: its entry in the manifest, and the plain arrays it becomes and comes back from.

A CodebookArray at path P becomes P/codebook [n, g] and P/index, the packed index uint8 [bytes] (absent for one
code, which needs no bits). Any other array is stored as it is. Knows nothing of folders, files or models.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from cluscomp_jax import codebook
from cluscomp_jax.codebook import Axis, CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.io import bitpack

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32")}
"""The dtypes that weights and codebooks may have on disk, by the name the manifest gives them."""


@dataclasses.dataclass(frozen=True)
class MatrixEntry:
    """What the manifest says of a compressed matrix.

    Attributes:
      shape: (d_in, d_out).
      axis: the axis that is cut, "out" or "in".
      group_size: weights per code, 1 to 32.
      num_codes: 1 to 65536.
      codebook_dtype: a key of DTYPES.
    """

    shape: tuple[int, int]
    axis: Axis
    group_size: int
    num_codes: int
    codebook_dtype: str

    @property
    def index_bits(self) -> int:
        """The bits of one packed index entry."""
        return codebook.index_bits(self.num_codes)

    @property
    def index_shape(self) -> tuple[int, int]:
        """The shape of the unpacked index."""
        return codebook.index_shape(self.shape, self.group_size, self.axis)

    @property
    def stored_bits(self) -> int:
        """The bits of the packed index (its last byte not rounded up) and of the codebook in its dtype."""
        codes = 8 * DTYPES[self.codebook_dtype].itemsize * self.group_size * self.num_codes
        return self.index_bits * math.prod(self.index_shape) + codes

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; `bits_per_weight` and `index_bits` are there to be read by people and other tools."""
        return {
            "shape": list(self.shape),
            "axis": self.axis,
            "group_size": self.group_size,
            "num_codes": self.num_codes,
            "index_bits": self.index_bits,
            "codebook_dtype": self.codebook_dtype,
            "bits_per_weight": self.stored_bits / math.prod(self.shape),
        }


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What the manifest says of an array stored as it is: its shape, each size at least 1, and a key of DTYPES."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """The bytes of the array."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"shape": list(self.shape), "dtype": self.dtype}


Entry = MatrixEntry | TensorEntry
ArraySpec = tuple[tuple[int, ...], np.dtype[Any]]
"""The shape and dtype of an array."""


def _dtype_name(dtype: Any, where: str) -> str:
    name: str = np.dtype(dtype).name
    if name not in DTYPES:
        raise InputError(f"{where}: dtype {name} cannot be stored; convert it to one of {', '.join(DTYPES)}")
    return name


def encode(path: str, leaf: Any) -> tuple[Entry, dict[str, np.ndarray[Any, Any]]]:
    """Returns the entry of a parameter and {path: host array} of what is written for it.

    Raises:
      InputError: a CodebookArray whose parts do not fit each other, an empty array, or a dtype outside DTYPES.
    """
    if not isinstance(leaf, CodebookArray):
        array = np.asarray(leaf)
        if array.size == 0:
            raise InputError(f"{path}: shape {array.shape} is empty; there is nothing to store")
        return TensorEntry(array.shape, _dtype_name(array.dtype, path)), {path: array}
    codebook.validate(leaf, path)
    codes = np.asarray(leaf.codebook)
    d_in, d_out = leaf.shape
    dtype = _dtype_name(codes.dtype, path)
    entry = MatrixEntry((int(d_in), int(d_out)), leaf.axis, leaf.group_size, leaf.num_codes, dtype)
    arrays = {f"{path}/codebook": codes}
    if entry.index_bits:
        arrays[f"{path}/index"] = bitpack.pack(np.asarray(leaf.index), entry.index_bits)
    return entry, arrays


def stored_arrays(path: str, entry: Entry) -> dict[str, ArraySpec]:
    """Returns {path: (shape, dtype)} of what `encode` writes for a parameter of that entry."""
    if isinstance(entry, TensorEntry):
        return {path: (entry.shape, DTYPES[entry.dtype])}
    codes: ArraySpec = ((entry.num_codes, entry.group_size), DTYPES[entry.codebook_dtype])
    if not entry.index_bits:
        return {f"{path}/codebook": codes}
    size = bitpack.packed_bytes(math.prod(entry.index_shape), entry.index_bits)
    return {f"{path}/codebook": codes, f"{path}/index": ((size,), np.dtype(np.uint8))}


def decode(path: str, entry: Entry, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """Returns the parameter that `encode` turned into `arrays`, a NumPy array or a CodebookArray of NumPy arrays.

    Args:
      path: names the parameter and its arrays.
      entry: its entry.
      arrays: at least what `stored_arrays(path, entry)` names, in those shapes and dtypes.

    Raises:
      InputError: the index names a code that the codebook does not have.
    """
    if isinstance(entry, TensorEntry):
        return arrays[path]
    count = math.prod(entry.index_shape)
    if entry.index_bits:
        index = bitpack.unpack(arrays[f"{path}/index"], entry.index_bits, count)
    else:
        index = np.zeros(count, np.uint8)
    matrix = CodebookArray(arrays[f"{path}/codebook"], index.reshape(entry.index_shape), entry.shape, entry.axis)
    return codebook.validate(matrix, path)
