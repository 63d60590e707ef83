"""How the axes of a host's array and those of its index are split over a mesh, one following from the other.

A side of a matrix [d_in, d_out] is some axes of the host. It can be split over devices as the first of them is, where
every device then has whole vectors, as many as the others. Knows axes and mesh axes, no arrays.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluscomp_jax.core.host_axes import HostAxes


@dataclasses.dataclass(frozen=True)
class Splits:
    """The axes of a CodebookArray's host array, of its index and of its codebook.

    Attributes:
      host: of one matrix.
      stacked: number of the stacked axes.
      pieces: sizes of the sides of one index.
      padded: of each side, whether its last vectors reach beyond it.
      mesh: {mesh axis: its size}.
    """

    host: HostAxes
    stacked: int
    pieces: tuple[int, int]
    padded: tuple[bool, bool]
    mesh: Mapping[str, int]

    def of_index(self, spec: Sequence[Any]) -> tuple[Any, ...]:
        """Returns what each axis of the index is split over, of what each axis of the host's array is: `spec`.

        An entry is a mesh axis, several, or None.
        """
        entries = [*spec, *(None,) * (len(self.host.shape) + self.stacked - len(spec))]
        sides = [
            entry if self._divides(entry, side) else None
            for side, entry in enumerate(entries[self._axis(self._first(side))] for side in (0, 1))
        ]
        return self._with_stack(entries, sides)

    def of_codebook(self, spec: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the same for the codebook, of which stacked axes alone are split."""
        entries = [*spec, *(None,) * (len(self.host.shape) + self.stacked - len(spec))]
        return self._with_stack(entries, [None, None])

    def of_host(self, index_spec: Sequence[Any]) -> tuple[Any, ...]:
        """Returns what each axis of the host's array can be split over, of what each axis of the index is."""
        at, stacked = self.host.stack_at, self.stacked
        entries = [*index_spec, *(None,) * (2 + stacked - len(index_spec))]
        out: list[Any] = [None] * (len(self.host.shape) + stacked)
        out[at : at + stacked] = entries[at : at + stacked]
        for side in (0, 1):
            entry, axis = entries[side if side < at else side + stacked], self._first(side)
            if self._divides(entry, side) and self.host.shape[axis] % self._parts(entry) == 0:
                out[self._axis(axis)] = entry
        return tuple(out)

    def _with_stack(self, entries: Sequence[Any], sides: Sequence[Any]) -> tuple[Any, ...]:
        at = self.host.stack_at
        return (*sides[:at], *entries[at : at + self.stacked], *sides[at:])

    def _first(self, side: int) -> int:
        """Returns the axis of one matrix in the host that is the outermost of a side."""
        axes = self.host.order[self.host.num_in :] if side else self.host.order[: self.host.num_in]
        return next((axis for axis in axes if self.host.shape[axis] > 1), axes[0])

    def _axis(self, axis: int) -> int:
        return axis if axis < self.host.stack_at else axis + self.stacked

    def _parts(self, entry: Any) -> int:
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        return math.prod(self.mesh[name] for name in names)

    def _divides(self, entry: Any, side: int) -> bool:
        return not self.padded[side] and self.pieces[side] % self._parts(entry) == 0
