"""The calls that `verify` compiles: every GPU kernel in every shipped configuration. Shapes only; compiles nothing."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_matmul import config, strips
from pallas_kernels.codebook_matmul.definition import Axis, stream_words

Kernel = Literal["forward", "dx", "scatter", "segment"]
GROUPS = (1, 2, 4, 5, 6, 8, 9, 16, 18, 32)
_MAIN_GROUPS = (4, 8, 16)
LLAMA_2_70B = ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192))
_MATRIX_KERNELS: tuple[Kernel, ...] = ("forward", "dx", "scatter")
TRELLISES = ((4096, 2), (4096, 4), (4096, 6), (4096, 7), (4096, 8), (1024, 4))
"""(codes, bits of a step) of the trellis indices, of two weights a code; words of 7 bits are not expanded."""
_ODD = (576, 1000)
"""Sides that no tile divides."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one kernel.

    Attributes:
      kernel: "forward" x @ W, "dx" dy @ W.T, "scatter" the atomic gradient of the codebook, "segment" the ordered sum
        of one strip of it.
      m: rows of x and dy.
      shape: (d_in, d_out).
      g, n: weights per code, codes.
      axis: the axis of W that the codes run along.
      dtype: of x and the codebook.
      step_bits: b of a trellis index; None: the index has the codes themselves.
    """

    kernel: Kernel
    m: int
    shape: tuple[int, int]
    g: int
    n: int = 65536
    axis: Axis = "out"
    dtype: str = "bfloat16"
    step_bits: int | None = None

    @property
    def name(self) -> str:
        """One word that distinguishes the case from all others."""
        (d_in, d_out), trellis = self.shape, "" if self.step_bits is None else f"-trellis{self.step_bits}"
        return f"{self.kernel}-{self.axis}-{self.m}x{d_in}x{d_out}-g{self.g}-n{self.n}{trellis}-{self.dtype}"

    @property
    def _lines(self) -> tuple[int, int]:
        """(lines of codes, codes of a line)."""
        d_in, d_out = self.shape
        return (d_in, -(-d_out // self.g)) if self.axis == "out" else (d_out, -(-d_in // self.g))

    @property
    def codes(self) -> int:
        """Codes of the matrix, each of which is looked up in the codebook."""
        return math.prod(self._lines)

    @property
    def index_shape(self) -> tuple[int, int]:
        """The index array's: codes, or the words of the streams of a trellis index."""
        lines, length = self._lines
        if self.step_bits is not None:
            length = stream_words(length, self.n, self.step_bits)
        return (lines, length) if self.axis == "out" else (length, lines)

    @property
    def index_dtype(self) -> Any:
        """The index array's."""
        return jnp.uint32 if self.step_bits is not None else jnp.uint8 if self.n <= 256 else jnp.uint16

    @property
    def index_bytes(self) -> int:
        """Bytes of the index array."""
        return math.prod(self.index_shape) * int(jnp.dtype(self.index_dtype).itemsize)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return 4 if self.dtype == "float32" else 2

    @property
    def sides(self) -> tuple[int, int]:
        """(depth, width) of the matrix that a product multiplies by: W or its transpose."""
        return (self.shape[1], self.shape[0]) if self.kernel == "dx" else self.shape

    @property
    def tile(self) -> config.GemmConfig:
        """The tiles of a product."""
        sizes: dict[str, Any] = {"g": self.g, "n": self.n, "itemsize": self.itemsize}
        return config.gemm_config(self.m, *self.sides, **sizes, steps=self.steps)

    @property
    def wide(self) -> bool:
        """Whether the codes run along the width of the matrix that a product multiplies by, not along its depth."""
        return (self.axis == "out") != (self.kernel == "dx")

    @property
    def steps(self) -> config.Steps | None:
        """The streams of a trellis index in a product."""
        return None if self.step_bits is None else config.Steps(self.step_bits, self.wide)

    @property
    def programs(self) -> int:
        """Programs of a product."""
        tile = self.tile
        covered = tile.block_n // config.padded_group(self.g) * self.g if self.wide else tile.block_n
        return -(-self.m // tile.block_m) * tile.splits * -(-self.sides[1] // covered)

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the kernel's function and the shapes of its arguments."""
        from pallas_kernels.codebook_matmul import triton

        def array(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]

        d_in, d_out = self.shape
        x, dy = array((self.m, d_in), self.dtype), array((self.m, d_out), self.dtype)
        index = array(self.index_shape, self.index_dtype)
        codebook = array((self.n, self.g), self.dtype)
        if self.kernel == "segment":
            p = min(self.codes, strips.STRIP_BYTES // (4 * self.g))
            tile: Any = config.segment_config(self.n, self.g)
            vectors = array((p, self.g), jnp.float32)
            arguments = (vectors, array((p,), jnp.int32), array((self.n + 1,), jnp.int32))
            return functools.partial(triton.segment_sum, tile=tile), arguments
        if self.kernel == "scatter":
            tile = config.scatter_config(self.itemsize)
            fixed = {"num_codes": self.n, "g": self.g, "axis": self.axis, "step_bits": self.step_bits, "tile": tile}
            return functools.partial(triton.scatter_gradient, **fixed), (x, dy, index)
        transposed = self.kernel == "dx"
        cut = {"shape": self.shape, "axis": self.axis, "step_bits": self.step_bits}
        fixed = cut | {"transposed": transposed, "tile": self.tile}
        product = functools.partial(triton.gemm, **fixed)
        return product, (dy if transposed else x, codebook, index)


def shipped() -> Iterator[Case]:
    """Yields the cases of the table."""
    axes: tuple[Axis, ...] = ("out", "in")
    for axis in axes:
        for g in GROUPS:
            for kernel in _MATRIX_KERNELS:
                yield Case(kernel=kernel, m=2048, shape=(8192, 8192), g=g, axis=axis)
            yield Case(kernel="forward", m=1, shape=(8192, 28672), g=g, axis=axis)
        for g in _MAIN_GROUPS:
            for shape in LLAMA_2_70B:
                if shape != (8192, 28672):
                    yield Case(kernel="forward", m=1, shape=shape, g=g, axis=axis)
        for g in (4, 6):
            yield Case(kernel="forward", m=1, shape=_ODD, g=g, n=256, axis=axis)
            for kernel in _MATRIX_KERNELS:
                yield Case(kernel=kernel, m=100, shape=_ODD, g=g, n=256, axis=axis)
        for m in (16, 64):
            yield Case(kernel="forward", m=m, shape=(8192, 8192), g=4, axis=axis)
        for kernel in _MATRIX_KERNELS:
            for dtype in ("float16", "float32"):
                yield Case(kernel=kernel, m=2048, shape=(8192, 8192), g=4, axis=axis, dtype=dtype)
        yield Case(kernel="forward", m=1, shape=(8192, 8192), g=4, axis=axis, dtype="float32")
    for g in (1, 4, 6, 16, 32):
        for n in (16, 256, 65536):
            yield Case(kernel="segment", m=2048, shape=(8192, 8192), g=g, n=n)
    yield from _trellises()


def _trellises() -> Iterator[Case]:
    """Yields the cases of trellis indices."""
    axes: tuple[Axis, ...] = ("out", "in")
    for axis in axes:
        for n, step_bits in TRELLISES:
            case = Case(kernel="forward", m=1, shape=(8192, 8192), g=2, n=n, axis=axis, step_bits=step_bits)
            for shape in LLAMA_2_70B:
                yield dataclasses.replace(case, shape=shape)
            yield dataclasses.replace(case, shape=_ODD)
            for kernel in _MATRIX_KERNELS:
                yield dataclasses.replace(case, kernel=kernel, m=2048)
                yield dataclasses.replace(case, kernel=kernel, m=100, shape=_ODD)
