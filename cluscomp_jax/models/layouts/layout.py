"""Layout: how a codebase names and shapes the parameters of a decoder, as a table. Knows no codebase and no pytree.

"Ours" is the FlaxLlama layout, the "host" is the codebase. Letters of axes: i inputs, o outputs, n heads, h head_dim,
v vocabulary, d model width.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from cluscomp_jax.core.host_axes import HostAxes, parse_axes
from cluscomp_jax.models.model import Model

Row = tuple[str, str]
"""(pattern of the host's path, axes of the host's array). The axes of a kernel say which are inputs and outputs,
"i n h -> | i | n h", those of another array are names alone, "n h"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    r"""The names and shapes of one codebase.

    Patterns are regular expressions of "/"-joined paths; a "." in a host's path counts as "/". Whatever precedes the
    embeddings in the host's tree ("params/") precedes all patterns.

    Attributes:
      name: of the codebase, for messages.
      outer: {our path: row} of the parameters outside the blocks; that of the embeddings comes first.
      block: {our path within the block: row}, the patterns relative to the host's block.
      blocks: pattern of the path of a block, with its number as group (\d+), or without where blocks are stacked.
      stack_at: the axis that stacks the blocks; None: every block has arrays of its own.
      unused: pattern of host paths that hold no parameter of the model.
      scaled_queries: the model types whose kernel of q contains the factor 1/sqrt(head_dim) here.
      neighbours: the rope types for which the outputs of q and k that rotate together are next to each other here.
      families: the model types whose forward pass in this codebase is known to be ours; (): all whose names fit.
    """

    name: str
    outer: Mapping[str, Row]
    block: Mapping[str, Row]
    blocks: str
    stack_at: int | None = None
    unused: str = r".*\binv_freq"
    scaled_queries: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    families: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Role:
    """Which of our parameters a host's array holds.

    Attributes:
      path: our path, relative to the block for one in a block.
      axes: of the row.
      block: number of the block; None: outside the blocks, or of all blocks.
      in_block: the host's path relative to its block; None: outside the blocks.
    """

    path: str
    axes: str
    block: int | None
    in_block: str | None


def find_roles(layout: Layout, paths: Sequence[str]) -> dict[str, Role]:
    """Returns {host path: role} of the paths that the layout names; {} where it does not name the embeddings."""
    found: dict[str, Role] = {}
    spelled = {path: path.replace(".", "/") for path in paths}
    embedding = re.compile(rf"((?:[^/]+/)*?)(?:{next(iter(layout.outer.values()))[0]})")
    prefix = next((match[1] for path in spelled.values() if (match := embedding.fullmatch(path))), None)
    if prefix is None:
        return found
    outer = [(re.compile(row[0]), ours, row[1]) for ours, row in layout.outer.items()]
    block = [(re.compile(row[0]), ours, row[1]) for ours, row in layout.block.items()]
    blocks = re.compile(rf"(?:{layout.blocks})/(?P<inside>.+)")
    for path, spelling in spelled.items():
        if not spelling.startswith(prefix):
            continue
        rest = spelling.removeprefix(prefix)
        inside = blocks.fullmatch(rest)
        number = None if inside is None or layout.stack_at is not None else int(inside[1])
        rows, name = (outer, rest) if inside is None else (block, inside["inside"])
        for pattern, ours, axes in rows:
            if pattern.fullmatch(name):
                found[path] = Role(ours, axes, number, None if inside is None else path[-len(name) :])
    return found


def is_kernel(axes: str) -> bool:
    """Returns whether the axes of a row are those of a kernel."""
    return "->" in axes


def host_shape(axes: str, shape: tuple[int, ...], model: Model) -> tuple[int, ...]:
    """Returns the shape that the host's array has, without stacked axes.

    Args:
      axes: of the row.
      shape: ours.
      model: its config has `head_dim`, where the axes name it.
    """
    left, _, right = axes.partition("->")
    names = left.split()
    sides = [side.split() for side in right.split("|")[1:]] if right else [[name] for name in names]
    if len(sides) != len(shape):
        sides = [names]
    sizes: dict[str, int] = {}
    for side, size in zip(sides, shape, strict=True):
        width = model.config.head_dim if "h" in side else 1
        sizes |= {name: width if name == "h" else size // width for name in side}
    return tuple(sizes[name] for name in names)


def host_axes(axes: str, shape: tuple[int, ...], dtype: object, layout: Layout) -> HostAxes:
    """Returns the axes of a kernel of `host_shape`, the blocks stacked where the layout has them."""
    one, _ = parse_axes(axes, shape, dtype, layout.name)
    return one if layout.stack_at is None else dataclasses.replace(one, stack_at=layout.stack_at)
