"""The calls of the search kernels that `verify` compiles. Shapes only; compiles nothing."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from pallas_kernels.code_walk.config import (
    PathConfig,
    WalkConfig,
    listed_config,
    nearest_config,
    path_config,
    walk_config,
)

SearchKernel = Literal["walk", "refine", "path", "nearest", "listed", "leaf"]
_CHANNELS = 128
_TREES, _COMPARED, _LARGEST_LEAF = 3, 64, 16
"""Trees of a code index; codes that one of them compares with a vector, times g; the codes of its largest leaf."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchCase:
    """One call of a kernel that searches codes.

    Attributes:
      kernel: "walk" a block of error feedback, "refine" one of refinement, which has previous codes; "path" the even
        strips of a channel of trellis codes; of k-means "nearest" the search of all codes, "listed" that of lists,
        "leaf" the descent of a tree.
      outputs: o, of a channel; vectors of k-means.
      g, n: weights per code, codes.
      step_bits: b of trellis codes; None: codes are chosen one by one.
    """

    kernel: SearchKernel
    outputs: int
    g: int
    n: int
    step_bits: int | None = None

    @property
    def name(self) -> str:
        """One word that distinguishes the case from all others."""
        return f"{self.kernel}-{self.outputs}-g{self.g}-n{self.n}" + (f"-b{self.step_bits}" if self.step_bits else "")

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

    @property
    def path_tile(self) -> PathConfig:
        """How channels of trellis codes are cut."""
        found = path_config(self.vectors, self.g, self.n.bit_length() - 1, self.step_bits or 1)
        assert found is not None
        return found

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the kernel's function and the shapes of its arguments."""
        return {"path": self._path, "walk": self._walk, "refine": self._walk}.get(self.kernel, self._many)()

    def _many(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from pallas_kernels.code_walk import many

        vectors, (depth, leaf, _) = array(self.outputs, self.g), self.leaves
        if self.kernel == "nearest":
            return functools.partial(many.nearest, tile=nearest_config(self.g)), (vectors, array(self.n, self.g))
        if self.kernel == "leaf":
            return many.leaf_of, (vectors, array(self.g, min(self.g, depth)), array((1 << depth) - 1))
        tile, leaves = listed_config(self.g), 1 << depth
        lists = array(leaves, -(-max(128, 64 * self.g) // leaf), dtype="int32")
        tiles = array(self.outputs // tile.vectors, dtype="int32")
        return functools.partial(many.nearest_listed, tile=tile), (vectors, tiles, array(leaves, self.g, leaf), lists)

    def _path(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from pallas_kernels.code_walk.paths import Launch, search_strips

        tile, c = self.path_tile, self.vectors
        strips = -(-c // (2 * tile.steps))
        wide = 2 * strips * tile.steps + 2 * tile.margin
        sizes: dict[str, Any] = {
            "first": tile.margin,
            "margin": tile.margin,
            "begin": tile.margin,
            "end": tile.margin + c,
        }
        launch = Launch(strips=strips, steps=tile.steps, held=False, **sizes)
        block, r, g = array(_CHANNELS, self.g, wide), _CHANNELS, self.g
        arguments = (array(r, wide, dtype="int32"), block, block, block, array(g, wide), array(r, r), array(self.n, g))
        fixed: dict[str, Any] = {"launch": launch, "step_bits": self.step_bits, "num_warps": tile.num_warps}
        return functools.partial(search_strips, **fixed), (*arguments, array(1, dtype="int32"))

    def _walk(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from pallas_kernels.code_walk.nearest import SearchTrees, walk_nearest

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


def array(*shape: int, dtype: Any = "float32") -> Any:
    """Returns the shape of an argument."""
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def searches() -> Iterator[SearchCase]:
    """Yields the cases of the table."""
    for g, n in ((4, 65500), (6, 65500), (8, 32000), (16, 65500), (2, 4096)):
        yield SearchCase(kernel="refine", outputs=8192, g=g, n=n)
    yield SearchCase(kernel="walk", outputs=28672, g=4, n=65500)
    for g, n in ((4, 4096), (4, 256), (3, 512), (8, 8192), (16, 16384), (1, 16), (32, 256)):
        yield SearchCase(kernel="walk", outputs=8192, g=g, n=n)
    yield SearchCase(kernel="walk", outputs=1024, g=4, n=4096)
    for g, n, step_bits in ((2, 4096, 2), (2, 4096, 4), (2, 4096, 6), (2, 4096, 8), (2, 256, 7), (1, 1024, 3)):
        yield SearchCase(kernel="path", outputs=8192, g=g, n=n, step_bits=step_bits)
    for g, n in ((1, 16), (4, 256), (4, 4096), (8, 4096), (16, 4096), (32, 4096)):
        yield SearchCase(kernel="nearest", outputs=2**20, g=g, n=n)
    for g, n in ((4, 65500), (6, 65500), (8, 32000), (16, 65500)):
        yield SearchCase(kernel="listed", outputs=2**20, g=g, n=n)
        yield SearchCase(kernel="leaf", outputs=2**20, g=g, n=n)
