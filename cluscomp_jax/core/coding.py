"""What an index says: the contract of a coding, and the two that there are.

A matrix is stored as a codebook [n, g], which trains, and an index, which does not. Its coding alone knows how the two
make the matrix. A product, a checkpoint, a report asks the coding; another coding is one more class here, or anywhere
else that calls `register`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import bitpack
from cluscomp_jax.errors import InputError
from pallas_kernels.codebook_matmul import (
    codebook_matmul,
    codes_of,
    decode,
    stream_bits,
    stream_words,
    streams_of,
    window_bits,
)

Axis = Literal["out", "in"]
MAX_CODES = 65536
MAX_GROUP = 32


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static of a matrix and its codebook.

    Attributes:
      matrix_shape: (d_in, d_out).
      num_codes: n, rows of the codebook.
      group_size: g, weights per code.
      axis: the axis that the codes run along, "out" or "in".
    """

    matrix_shape: tuple[int, int]
    num_codes: int
    group_size: int
    axis: Axis = "out"

    @property
    def lines(self) -> int:
        """The size of the axis that is not cut."""
        return self.matrix_shape[0 if self.axis == "out" else 1]

    @property
    def vectors(self) -> int:
        """The vectors of one line, ceil(cut axis / g)."""
        return -(-self.matrix_shape[1 if self.axis == "out" else 0] // self.group_size)

    def along(self, size: int) -> tuple[int, int]:
        """Returns the shape of an index with `size` numbers a line: [d_in, size] for axis "out", else [size, d_out]."""
        return (self.lines, size) if self.axis == "out" else (size, self.lines)


class Coding(abc.ABC):
    """How a codebook and an index make a matrix. Subclasses are frozen dataclasses of plain numbers.

    Attributes:
      name: in manifests; unique.
      splits_lines: whether every part of a line of the index can be decoded without the rest of it.
    """

    name: ClassVar[str]
    splits_lines: ClassVar[bool]

    @abc.abstractmethod
    def check(self, form: Form, where: str) -> None:
        """Raises InputError, with `where`, unless a matrix of this form can be coded."""

    @abc.abstractmethod
    def index_spec(self, form: Form) -> tuple[tuple[int, int], Any]:
        """Returns the shape and the dtype of the index in memory."""

    @abc.abstractmethod
    def index_bits(self, form: Form) -> int:
        """Returns the bits of the index in storage, its last byte not rounded up."""

    @abc.abstractmethod
    def check_index(self, form: Form, index: np.ndarray[Any, Any], where: str) -> None:
        """Raises InputError, with `where`, if the index [..., *index_spec's shape] says something that is not there."""

    @abc.abstractmethod
    def pack(self, form: Form, index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns the stored bytes, uint8, of an index [..., *index_spec's shape]."""

    @abc.abstractmethod
    def unpack(self, form: Form, stored: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
        """Returns the index [count, *index_spec's shape] of `count` matrices; undoes `pack`."""

    @abc.abstractmethod
    def decode(self, form: Form, codebook: jax.Array, index: jax.Array) -> jax.Array:
        """Returns W [d_in, d_out] in the codebook's dtype."""

    @abc.abstractmethod
    def matmul(self, form: Form, x: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
        """Returns x @ W [..., d_out] in the dtype of x; differentiable in x and codebook."""

    @abc.abstractmethod
    def codes(self, form: Form, index: Any) -> jax.Array:
        """Returns the code of every vector, integers [*form.along(form.vectors)]."""

    @abc.abstractmethod
    def index_of(self, form: Form, codes: Any) -> jax.Array:
        """Returns the index of such codes; undoes `codes`."""

    def settings(self) -> dict[str, int]:
        """Returns the numbers of the coding, for manifests and records."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def __str__(self) -> str:
        return self.name


class _OfKernels(Coding):
    """The codings that the kernels of `pallas_kernels` know.

    Attributes:
      step_bits: as the kernels take it; None: the index has the codes themselves.
    """

    step_bits: int | None

    def decode(self, form: Form, codebook: jax.Array, index: jax.Array) -> jax.Array:
        """As `Coding`."""
        return decode(codebook, index, shape=form.matrix_shape, axis=form.axis, step_bits=self.step_bits)

    def matmul(self, form: Form, x: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
        """As `Coding`."""
        fixed: dict[str, Any] = {"shape": form.matrix_shape, "axis": form.axis, "step_bits": self.step_bits}
        return codebook_matmul(x, codebook, index, **fixed)

    def codes(self, form: Form, index: Any) -> jax.Array:
        """As `Coding`."""
        cut: dict[str, Any] = {"num_codes": form.num_codes, "g": form.group_size, "axis": form.axis}
        return codes_of(jnp.asarray(index), shape=form.matrix_shape, step_bits=self.step_bits, **cut)


@dataclasses.dataclass(frozen=True)
class Plain(_OfKernels):
    """The index has the number of every vector's code: W[i, j*g+t] = codebook[index[i, j], t] for axis "out"."""

    name = "plain"
    splits_lines = True
    step_bits = None

    def check(self, form: Form, where: str) -> None:
        """As `Coding`."""
        n, g = form.num_codes, form.group_size
        if not 1 <= n <= MAX_CODES or not 1 <= g <= MAX_GROUP:
            raise InputError(f"{where}: codebook is [{n}, {g}]; codes must be 1 to {MAX_CODES}, group 1 to {MAX_GROUP}")

    def index_spec(self, form: Form) -> tuple[tuple[int, int], Any]:
        """As `Coding`."""
        return form.along(form.vectors), np.dtype(index_dtype(form.num_codes))

    def index_bits(self, form: Form) -> int:
        """As `Coding`."""
        return code_bits(form.num_codes) * form.lines * form.vectors

    def check_index(self, form: Form, index: np.ndarray[Any, Any], where: str) -> None:
        """As `Coding`."""
        highest = int(np.max(index))
        if highest >= form.num_codes:
            raise InputError(f"{where}: index names code {highest}, the codebook has {form.num_codes}")

    def pack(self, form: Form, index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """As `Coding`."""
        return bitpack.pack(index, code_bits(form.num_codes))

    def unpack(self, form: Form, stored: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
        """As `Coding`."""
        shape, dtype = self.index_spec(form)
        bits = code_bits(form.num_codes)
        size = count * math.prod(shape)
        index = bitpack.unpack(stored, bits, size) if bits else np.zeros(size, dtype)
        return index.reshape(count, *shape)

    def index_of(self, form: Form, codes: Any) -> jax.Array:
        """As `Coding`."""
        return jnp.asarray(codes).astype(index_dtype(form.num_codes))


@dataclasses.dataclass(frozen=True)
class TrellisCoding(_OfKernels):
    """The index has a stream of bits for every line; code j is the window of L bits, n = 2^L, that begins at bit j*b.

    Consecutive codes have L - b bits in common, so that a vector takes b bits of storage and not L (trellis-coded
    quantisation: Marcellin and Fischer, 1990; with bit-shift trellises QTIP, Tseng et al., 2024). In memory a stream is
    uint32 words, least significant bit first; stored, the streams' L - b + b * vectors bits are laid end to end.

    Attributes:
      step_bits: b, 1 to L.
    """

    step_bits: int

    name = "trellis"
    splits_lines = False

    def check(self, form: Form, where: str) -> None:
        """As `Coding`."""
        n, g, b = form.num_codes, form.group_size, self.step_bits
        window = window_bits(n)
        if not 2 <= n <= MAX_CODES or n != 1 << window:
            raise InputError(f"{where}: a trellis has {n} codes; they must be a power of two, 2 to {MAX_CODES}")
        if not 1 <= g <= MAX_GROUP:
            raise InputError(f"{where}: a trellis has codes of {g} weights; they must be 1 to {MAX_GROUP}")
        if not 1 <= b <= window:
            raise InputError(f"{where}: step_bits is {b}; windows of {window} bits ({n} codes) take 1 to {window}")

    def index_spec(self, form: Form) -> tuple[tuple[int, int], Any]:
        """As `Coding`."""
        words = stream_words(form.vectors, form.num_codes, self.step_bits)
        return form.along(words), np.dtype(np.uint32)

    def index_bits(self, form: Form) -> int:
        """As `Coding`."""
        return form.lines * self._stream_bits(form)

    def check_index(self, form: Form, index: np.ndarray[Any, Any], where: str) -> None:
        """Any bits of a stream are codes; those after its end must be 0, so that equal matrices are equal bytes."""
        used = self._stream_bits(form) % 32
        last = index[..., -1] if form.axis == "out" else index[..., -1, :]
        if used and bool((last >> np.uint32(used)).any()):
            raise InputError(f"{where}: a stream has bits after its end of {self._stream_bits(form)} bits")

    def pack(self, form: Form, index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """As `Coding`."""
        lines = index if form.axis == "out" else index.swapaxes(-1, -2)
        return bitpack.pack_lines(lines.reshape(-1, lines.shape[-1]), self._stream_bits(form))

    def unpack(self, form: Form, stored: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
        """As `Coding`."""
        lines = bitpack.unpack_lines(stored, self._stream_bits(form), count * form.lines).reshape(count, form.lines, -1)
        return lines if form.axis == "out" else np.ascontiguousarray(lines.swapaxes(1, 2))

    def index_of(self, form: Form, codes: Any) -> jax.Array:
        """As `Coding`."""
        return streams_of(jnp.asarray(codes), num_codes=form.num_codes, axis=form.axis, step_bits=self.step_bits)

    def _stream_bits(self, form: Form) -> int:
        return stream_bits(form.vectors, form.num_codes, self.step_bits)

    def __str__(self) -> str:
        return f"trellis, {self.step_bits} bits a step"


PLAIN = Plain()
_CODINGS: dict[str, type[Coding]] = {}


def register(coding: type[Coding]) -> type[Coding]:
    """Enters a coding by its name, so that checkpoints that hold it can be read; returns it."""
    _CODINGS[coding.name] = coding
    return coding


for _known in (Plain, TrellisCoding):
    register(_known)


def coding_settings(name: str) -> tuple[str, ...]:
    """Returns the names of the numbers of a coding; () where there is none of that name."""
    kind = _CODINGS.get(name)
    return () if kind is None else tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]


def coding_of(name: str, settings: dict[str, int], where: str) -> Coding:
    """Returns the coding of a name and its numbers.

    Raises:
      InputError: there is none of that name, or it has other numbers; `where` says who asks.
    """
    kind = _CODINGS.get(name)
    if kind is None:
        raise InputError(f"{where}: coding is {name!r}; it must be one of {', '.join(_CODINGS)}")
    names = coding_settings(name)
    if sorted(settings) != sorted(names) or not all(type(value) is int for value in settings.values()):
        raise InputError(f"{where}: coding {name!r} takes {', '.join(names) or 'no numbers'}; found {settings}")
    return kind(**settings)


def index_dtype(num_codes: int) -> Any:
    """Returns the dtype of a plain index into `num_codes` codes: uint8 up to 256, else uint16."""
    return jnp.uint8 if num_codes <= 256 else jnp.uint16


def index_shape(shape: tuple[int, int], g: int, axis: Axis) -> tuple[int, int]:
    """Returns the shape of the plain index of a [d_in, d_out] matrix cut into g-vectors along `axis`."""
    form = Form(shape, 1, g, axis)
    return form.along(form.vectors)


def code_bits(num_codes: int) -> int:
    """Returns the bits of one entry of a plain index in storage: ceil(log2 n)."""
    return max(num_codes - 1, 0).bit_length()


def stored_bits(form: Form, coding: Coding = PLAIN, *, own: bool = True, codebook_bits: int = 16) -> int:
    """Returns the bits a matrix takes in storage: the index and a codebook of its own.

    Args:
      form: of the matrix.
      coding: of its index.
      own: False where another kernel stores the codebook.
      codebook_bits: of one number of the codebook.
    """
    return coding.index_bits(form) + (codebook_bits * form.group_size * form.num_codes if own else 0)
