"""How one parameter is stored: its entry in the manifest, and the conversion to and from plain arrays.

A CodebookArray at path P becomes P/codebook [n, g] and P/index, the packed index uint8 [bytes] (absent for one
code, which needs no bits); where its codebook is another kernel's, only that one stores it. Any other array is stored
as it is. Paths are those within an item. Knows nothing of folders, files or models.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from cluscomp_jax.checkpoint import bitpack
from cluscomp_jax.core import codebook
from cluscomp_jax.core.codebook import Axis, CodebookArray
from cluscomp_jax.errors import InputError

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32")}
"""The dtypes that weights and codebooks may have on disk, by the name the manifest gives them."""

ArraySpec = tuple[tuple[int, ...], np.dtype[Any]]
"""The shape and dtype of an array."""


@dataclasses.dataclass(frozen=True)
class MatrixEntry:
    """What the manifest says of a compressed matrix.

    Attributes:
      shape: (d_in, d_out).
      axis: the axis that is cut, "out" or "in".
      group_size: weights per code, 1 to 32.
      num_codes: 1 to 65536.
      codebook_dtype: a key of DTYPES.
      tied_to: path of the kernel that stores the codebook; None: this one.
    """

    shape: tuple[int, int]
    axis: Axis
    group_size: int
    num_codes: int
    codebook_dtype: str
    tied_to: str | None = None

    @property
    def index_bits(self) -> int:
        """The bits of one packed index entry."""
        return codebook.index_bits(self.num_codes)

    @property
    def index_shape(self) -> tuple[int, int]:
        """The shape of the unpacked index."""
        return codebook.index_shape(self.shape, self.group_size, self.axis)

    @property
    def codebook_spec(self) -> ArraySpec:
        """The codebook's shape and dtype, wherever it is stored."""
        return (self.num_codes, self.group_size), DTYPES[self.codebook_dtype]

    @property
    def stored_bits(self) -> int:
        """The bits of the index and of the codebook, where it is stored here (`codebook.stored_bits`)."""
        return codebook.stored_bits(
            self.shape,
            g=self.group_size,
            num_codes=self.num_codes,
            axis=self.axis,
            own=self.tied_to is None,
            codebook_bits=8 * DTYPES[self.codebook_dtype].itemsize,
        )

    @property
    def loaded_bytes(self) -> int:
        """The bytes in memory of the unpacked index and of the codebook, where it is stored here."""
        (codes, group), dtype = self.codebook_spec
        own = codes * group * dtype.itemsize if self.tied_to is None else 0
        return math.prod(self.index_shape) * (1 if self.index_bits <= 8 else 2) + own

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; `bits_per_weight` and `index_bits` are there to be read by people and other tools."""
        fields = {
            "shape": list(self.shape),
            "axis": self.axis,
            "group_size": self.group_size,
            "num_codes": self.num_codes,
            "index_bits": self.index_bits,
            "codebook_dtype": self.codebook_dtype,
            "bits_per_weight": self.stored_bits / math.prod(self.shape),
        }
        return fields if self.tied_to is None else {**fields, "codebook_of": self.tied_to}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What the manifest says of an array stored as it is: its shape, each size at least 1, and a key of DTYPES."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """The bytes of the array."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)

    @property
    def loaded_bytes(self) -> int:
        """The bytes in memory: those of the stored array."""
        return self.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"shape": list(self.shape), "dtype": self.dtype}


Entry = MatrixEntry | TensorEntry


def _dtype_name(dtype: Any, where: str) -> str:
    name = np.dtype(dtype).name
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
    shape, owner = (int(d_in), int(d_out)), leaf.tied_to
    entry = MatrixEntry(shape, leaf.axis, leaf.group_size, leaf.num_codes, dtype, owner)
    arrays = {f"{path}/codebook": codes} if owner is None else {}
    if entry.index_bits:
        arrays[f"{path}/index"] = bitpack.pack(np.asarray(leaf.index), entry.index_bits)
    return entry, arrays


def stored_arrays(path: str, entry: Entry) -> dict[str, ArraySpec]:
    """Returns {path: (shape, dtype)} of what `encode` writes for a parameter of that entry."""
    if isinstance(entry, TensorEntry):
        return {path: (entry.shape, DTYPES[entry.dtype])}
    stored = {f"{path}/codebook": entry.codebook_spec} if entry.tied_to is None else {}
    if entry.index_bits:
        size = bitpack.packed_bytes(math.prod(entry.index_shape), entry.index_bits)
        stored[f"{path}/index"] = ((size,), np.dtype(np.uint8))
    return stored


def decode(path: str, entry: Entry, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """Returns the parameter that `encode` turned into `arrays`, a NumPy array or a CodebookArray of NumPy arrays.

    Args:
      path: names the parameter and its arrays.
      entry: its entry.
      arrays: at least what `stored_arrays` names for this entry and for the one whose codebook it has, in those
        shapes and dtypes.

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
    owner, index = entry.tied_to, index.reshape(entry.index_shape)
    matrix = CodebookArray(arrays[f"{owner or path}/codebook"], index, entry.shape, entry.axis, owner)
    return codebook.validate(matrix, path)


def check_owners(entries: Mapping[str, Entry], where: Any) -> None:
    """Returns if every codebook that an entry of an item shares is stored in that item, in its shape and dtype.

    Raises:
      InputError: it is not; `where` names what holds the entries.
    """
    for path, entry in entries.items():
        if isinstance(entry, TensorEntry) or entry.tied_to is None:
            continue
        owner = entries.get(entry.tied_to)
        stored = owner.codebook_spec if isinstance(owner, MatrixEntry) and owner.tied_to is None else None
        if stored != entry.codebook_spec:
            raise InputError(
                f"{where}: {path} has the codebook of {entry.tied_to!r}, which stores none of "
                f"[{entry.num_codes}, {entry.group_size}] {entry.codebook_dtype}"
            )


def check_shared(leaves: Mapping[str, Any], where: Any) -> None:
    """Returns if kernels {path: leaf} that share a codebook hold the same numbers.

    Raises:
      InputError: they differ, so that storing one would lose the other.
    """
    for path, leaf in leaves.items():
        if isinstance(leaf, CodebookArray) and leaf.tied_to is not None:
            owner = leaves.get(leaf.tied_to)
            own = owner.codebook if isinstance(owner, CodebookArray) and owner.tied_to is None else None
            if own is None or np.asarray(own).tobytes() != np.asarray(leaf.codebook).tobytes():
                raise InputError(
                    f"{where}: the codebook of {path} is not that of {leaf.tied_to}, whose it is said to be; "
                    "change both, or set tied_to to None"
                )
