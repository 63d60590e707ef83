"""The calls of the search kernels that `verify` compiles. Shapes only; compiles nothing."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from pallas_kernels.code_walk.config import WalkConfig, walk_config

SearchKernel = Literal["walk", "refine"]
_CHANNELS = 128
_TREES, _COMPARED, _LARGEST_LEAF = 3, 64, 16
"""Trees of a code index; codes that one of them compares with a vector, times g; the codes of its largest leaf."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchCase:
    """One call of a kernel that searches codes.

    Attributes:
      kernel: "walk" a block of error feedback, "refine" one of refinement, which has previous codes.
      outputs: o, of a channel.
      g, n: weights per code, codes.
    """

    kernel: SearchKernel
    outputs: int
    g: int
    n: int

    @property
    def name(self) -> str:
        """One word that distinguishes the case from all others."""
        return f"{self.kernel}-{self.outputs}-g{self.g}-n{self.n}"

    @property
    def vectors(self) -> int:
        """Vectors of a channel."""
        return -(-self.outputs // self.g)

    @property
    def listed(self) -> bool:
        """Whether the codes are searched by trees."""
        return self.n > 1024 * self.g

    @property
    def leaves(self) -> tuple[int, int, int]:
        """(depth of a tree, codes of a leaf, leaves on a list)."""
        depth = (-(-self.n // _LARGEST_LEAF) - 1).bit_length()
        leaf = -(-self.n // (1 << depth))
        return depth, leaf, min(1 << depth, -(-_COMPARED * self.g // leaf))

    @property
    def tile(self) -> WalkConfig:
        """The tiles of a walk."""
        _, leaf, lists = self.leaves
        return walk_config(self.vectors, self.g, leaf * lists if self.listed else self.n, listed=self.listed)

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the kernel's function and the shapes of its arguments."""
        from pallas_kernels.code_walk.nearest import SearchTrees, walk_nearest

        def array(*shape: int, dtype: Any = "float32") -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]

        trees, (depth, leaf, lists) = None, self.leaves
        if self.listed:
            count, t = 1 << depth, _TREES
            trees = SearchTrees(
                array(t, self.g, min(self.g, depth)),
                array(t, count - 1),
                array(t, count * leaf, dtype="int32"),
                array(t, count, self.g, leaf),
                array(t, count, lists, dtype="int32"),
            )
        block = array(_CHANNELS, self.vectors * self.g)
        previous = array(_CHANNELS, self.vectors, dtype="int32") if self.kernel == "refine" else None
        function = functools.partial(walk_nearest, outputs=self.outputs, tile=self.tile)
        arguments = (block, block, array(_CHANNELS, _CHANNELS), array(self.n, self.g), trees, previous)
        return function, arguments


def searches() -> Iterator[SearchCase]:
    """Yields the cases of the table."""
    for g, n in ((4, 65500), (6, 65500), (8, 32000), (16, 65500), (2, 4096)):
        yield SearchCase(kernel="refine", outputs=8192, g=g, n=n)
    yield SearchCase(kernel="walk", outputs=28672, g=4, n=65500)
    for g, n in ((4, 4096), (4, 256), (3, 512), (8, 8192), (16, 16384), (1, 16), (32, 256)):
        yield SearchCase(kernel="walk", outputs=8192, g=g, n=n)
    yield SearchCase(kernel="walk", outputs=1024, g=4, n=4096)
