"""How one parameter is stored: its entry in the manifest, and the conversion to and from plain arrays.

A CodebookArray at path P becomes P/codebook [*stack, n, g] and P/index, the packed index uint8 [bytes] (absent for one
code, which needs no bits); where its codebook is another kernel's, only that one stores it. Any other array is stored
as it is. Paths are those within an item. Knows nothing of folders, files or models.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from cluscomp_jax.core import codebook, pytrees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import PLAIN, Axis, Coding, Form, code_bits, stored_bits
from cluscomp_jax.core.host_axes import HostAxes
from cluscomp_jax.errors import InputError

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32")}
"""The dtypes that weights and codebooks may have on disk, by the name the manifest gives them."""

TREE_DTYPES = DTYPES | {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "bool", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float64",
        "complex64", "complex128", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
        "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn",
    )
}  # fmt: skip
"""The dtypes that the dense arrays of any tree may have on disk; those of a model are DTYPES."""

ArraySpec = tuple[tuple[int, ...], np.dtype[Any]]
"""The shape and dtype of an array."""


@dataclasses.dataclass(frozen=True)
class MatrixEntry:
    """What the manifest says of a compressed matrix, or of a stack of them.

    Attributes:
      shape: (d_in, d_out), of one matrix.
      axis: the axis that is cut, "out" or "in".
      group_size: weights per code, 1 to 32.
      num_codes: 1 to 65536.
      codebook_dtype: a key of DTYPES.
      tied_to: path of the kernel that stores the codebook, relative to a block around both; None: this one.
      stack: the sizes of the stacked axes; () for one matrix.
      host: the axes that the host has for one matrix; None: [d_in, d_out].
      coding: of the index.
    """

    shape: tuple[int, int]
    axis: Axis
    group_size: int
    num_codes: int
    codebook_dtype: str
    tied_to: str | None = None
    stack: tuple[int, ...] = ()
    host: HostAxes | None = None
    coding: Coding = PLAIN

    @property
    def form(self) -> Form:
        """What is static of one matrix and its codebook."""
        return Form(self.shape, self.num_codes, self.group_size, self.axis)

    @property
    def num_weights(self) -> int:
        """The weights of all matrices."""
        return math.prod(self.stack) * math.prod(self.shape)

    @property
    def index_bits(self) -> int:
        """The bits of all indices in storage."""
        return math.prod(self.stack) * self.coding.index_bits(self.form)

    @property
    def index_spec(self) -> ArraySpec:
        """The shape of the index in memory, stacked axes in front, and its dtype."""
        shape, dtype = self.coding.index_spec(self.form)
        return (*self.stack, *shape), dtype

    @property
    def codebook_spec(self) -> ArraySpec:
        """The codebook's shape, stacked axes in front, and dtype, wherever it is stored."""
        return (*self.stack, self.num_codes, self.group_size), DTYPES[self.codebook_dtype]

    @property
    def stored_bits(self) -> int:
        """The bits of the index and of the codebook, where it is stored here (`coding.stored_bits`)."""
        own, codebook_bits = self.tied_to is None, 8 * DTYPES[self.codebook_dtype].itemsize
        return math.prod(self.stack) * stored_bits(self.form, self.coding, own=own, codebook_bits=codebook_bits)

    @property
    def loaded_bytes(self) -> int:
        """The bytes in memory of the index and of the codebook, where it is stored here."""
        parts = [self.index_spec] + ([self.codebook_spec] if self.tied_to is None else [])
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; `bits_per_weight` and `index_bits` are there to be read by people and other tools."""
        coding: dict[str, Any] = {"index_bits": code_bits(self.num_codes)}
        if self.coding != PLAIN:
            coding = {"coding": self.coding.name, **self.coding.settings()}
        fields: dict[str, Any] = {
            "shape": list(self.shape),
            "axis": self.axis,
            "group_size": self.group_size,
            "num_codes": self.num_codes,
            **coding,
            "codebook_dtype": self.codebook_dtype,
            "bits_per_weight": self.stored_bits / self.num_weights,
        }
        if self.tied_to is not None:
            fields["codebook_of"] = self.tied_to
        if self.stack:
            fields["stack"] = list(self.stack)
        if self.host is not None:
            host = dataclasses.asdict(self.host)
            fields["host"] = {name: list(value) if isinstance(value, tuple) else value for name, value in host.items()}
        return fields


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What the manifest says of an array stored as it is: its shape and a key of TREE_DTYPES.

    Where the manifest is a model's, each size is at least 1 and the dtype one of DTYPES. An array without numbers has
    no other trace than its entry.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """The bytes of the array."""
        return TREE_DTYPES[self.dtype].itemsize * math.prod(self.shape)

    @property
    def loaded_bytes(self) -> int:
        """The bytes in memory: those of the stored array."""
        return self.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"shape": list(self.shape), "dtype": self.dtype}


Entry = MatrixEntry | TensorEntry


def encode(path: str, leaf: Any) -> tuple[Entry, dict[str, np.ndarray[Any, Any]]]:
    """Returns the entry of a model's parameter and {path: host array} of what is written for it.

    Raises:
      InputError: a CodebookArray whose parts do not fit each other or which is no plain matrix, an empty array, or a
        dtype outside DTYPES.
    """
    if not isinstance(leaf, CodebookArray):
        array = np.asarray(leaf)
        if array.size == 0:
            raise InputError(f"{path}: shape {array.shape} is empty; there is nothing to store")
        return TensorEntry(array.shape, _dtype_name(array.dtype, path)), {path: array}
    host = leaf.host
    if leaf.stack or (host is not None and (host.order != (0, 1) or host.num_in != 1)):
        raise InputError(
            f"{path}: {leaf!r} is no plain matrix [d_in, d_out], as a model's checkpoint has them; cluscomp_jax.save "
            "stores it as it is"
        )
    return _encode_matrix(path, dataclasses.replace(leaf, host=None))


def encode_any(path: str, leaf: Any) -> tuple[Entry, dict[str, np.ndarray[Any, Any]]]:
    """Returns what `encode` does, of a leaf of any tree: stacked matrices in the host's axes, arrays of TREE_DTYPES.

    Raises:
      InputError: a leaf that is no array or has no numbers, another dtype, or a CodebookArray whose parts do not fit.
    """
    if not isinstance(leaf, CodebookArray):
        array = _numbers(path, leaf)
        name = _dtype_name(array.dtype, path, TREE_DTYPES)
        if array.size == 0:
            return TensorEntry(array.shape, name), {}
        return TensorEntry(array.shape, name), {path: array.astype(TREE_DTYPES[name], copy=False)}
    if leaf.host is not None and leaf.host.dtype is not None:
        _dtype_name(leaf.host.dtype, path, TREE_DTYPES)
    codes, index = _numbers(f"{path}/codebook", leaf.codebook), _numbers(f"{path}/index", leaf.index)
    return _encode_matrix(path, dataclasses.replace(leaf, codebook=codes, index=index))


def _encode_matrix(path: str, leaf: CodebookArray) -> tuple[MatrixEntry, dict[str, np.ndarray[Any, Any]]]:
    if 0 in leaf.index.shape:
        raise InputError(f"{path}: {leaf!r} is empty; there is nothing to store")
    codebook.validate(leaf, path)
    codes, index = (codebook.stack_in_front(part, leaf) for part in (leaf.codebook, leaf.index))
    d_in, d_out = leaf.matrix_shape
    entry = MatrixEntry(
        shape=(int(d_in), int(d_out)),
        axis=leaf.axis,
        group_size=leaf.group_size,
        num_codes=leaf.num_codes,
        codebook_dtype=_dtype_name(codes.dtype, path),
        tied_to=leaf.tied_to,
        stack=leaf.stack,
        host=leaf.host,
        coding=leaf.coding,
    )
    arrays = {f"{path}/codebook": codes} if leaf.tied_to is None else {}
    if entry.index_bits:
        arrays[f"{path}/index"] = entry.coding.pack(entry.form, index)
    return entry, arrays


def _dtype_name(dtype: Any, where: str, names: Mapping[str, Any] = DTYPES) -> str:
    name = np.dtype(dtype).name
    if name not in names:
        raise InputError(f"{where}: dtype {name} cannot be stored; convert it to one of {', '.join(names)}")
    return name


def _numbers(path: str, leaf: Any) -> np.ndarray[Any, Any]:
    """Returns a leaf as an array of the host.

    Raises:
      InputError: it has no numbers here, or is no array.
    """
    kind = type(leaf).__name__
    if isinstance(leaf, jax.core.Tracer):
        raise InputError(f"{path} is traced; save outside of jit")
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise InputError(f"{path} is {leaf.dtype}, no array of numbers; store jax.random.key_data of a key")
        if not leaf.is_fully_addressable:
            raise InputError(f"{path} is spread over processes; gather it first (multihost_utils.process_allgather)")
    elif not isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
        what = "which has no numbers" if isinstance(leaf, jax.ShapeDtypeStruct) else "no array"
        raise InputError(f"{path} is a {kind}, {what}; part the tree from it first (jax.tree.map, eqx.filter)")
    return np.asarray(leaf)


def stored_arrays(path: str, entry: Entry) -> dict[str, ArraySpec]:
    """Returns {path: (shape, dtype)} of what is written for a parameter of that entry."""
    if isinstance(entry, TensorEntry):
        return {path: (entry.shape, TREE_DTYPES[entry.dtype])} if 0 not in entry.shape else {}
    stored = {f"{path}/codebook": entry.codebook_spec} if entry.tied_to is None else {}
    if entry.index_bits:
        stored[f"{path}/index"] = ((-(-entry.index_bits // 8),), np.dtype(np.uint8))
    return stored


def decode(path: str, entry: Entry, arrays: Mapping[str, np.ndarray[Any, Any]], owner: str | None = None) -> Any:
    """Returns the parameter that was encoded as `arrays`, a NumPy array or a CodebookArray of NumPy arrays.

    Args:
      path: names the parameter and its arrays.
      entry: its entry.
      arrays: at least what `stored_arrays` names for this entry and for the one whose codebook it has, in those
        shapes and dtypes.
      owner: path of the parameter whose codebook it has; None: as the entry says.

    Raises:
      InputError: the index names a code that the codebook does not have, or has bits after its end.
    """
    if isinstance(entry, TensorEntry):
        return arrays[path] if 0 not in entry.shape else np.zeros(entry.shape, TREE_DTYPES[entry.dtype])
    stored = arrays[f"{path}/index"] if entry.index_bits else np.zeros(0, np.uint8)
    index = entry.coding.unpack(entry.form, stored, math.prod(entry.stack)).reshape(entry.index_spec[0])
    codes = arrays[f"{owner or entry.tied_to or path}/codebook"]
    if entry.host is not None and entry.stack:
        front = range(len(entry.stack))
        index, codes = (np.moveaxis(leaf, front, [entry.host.stack_at + k for k in front]) for leaf in (index, codes))
    matrix = CodebookArray(codes, index, entry.shape, entry.axis, entry.tied_to, entry.host, entry.coding)
    return codebook.validate(matrix, path)


def check_owners(entries: Mapping[str, Entry], where: Any) -> None:
    """Returns if every codebook that an entry of an item shares is stored in that item, in its shape and dtype.

    Raises:
      InputError: it is not; `where` names what holds the entries.
    """
    for path, entry in entries.items():
        if isinstance(entry, TensorEntry) or entry.tied_to is None:
            continue
        owner = entries.get(_owner(path, entry.tied_to, entries))
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
            owner = leaves.get(_owner(path, leaf.tied_to, leaves))
            own = owner if isinstance(owner, CodebookArray) and owner.tied_to is None else None
            if own is None or _code_bytes(own) != _code_bytes(leaf):
                raise InputError(
                    f"{where}: the codebook of {path} is not that of {leaf.tied_to}, whose it is said to be; "
                    "change both, or set tied_to to None"
                )


def _owner(path: str, tied_to: str, leaves: Mapping[str, Any]) -> str:
    """Returns the path of the kernel that `tied_to` means, or `tied_to` where there is none."""
    try:
        return pytrees.owner_path(path, tied_to, leaves)
    except InputError:
        return tied_to


def _code_bytes(leaf: CodebookArray) -> bytes:
    return codebook.stack_in_front(leaf.codebook, leaf).tobytes()
