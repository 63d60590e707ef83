"""How the host, a codebase of any kind, has the axes of a kernel that is clustered as matrices [d_in, d_out].

Knows shapes and axes, not codes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cluscomp_jax.errors import InputError


def with_stack(shape: Sequence[int], stack: Sequence[int], at: int) -> tuple[int, ...]:
    """Returns the shape of one matrix, or of its codebook or index, with the stacked axes put in at `at`."""
    return (*shape[:at], *stack, *shape[at:])


@dataclasses.dataclass(frozen=True)
class HostAxes:
    """The axes of one matrix in the host; those that stack matrices are read off the rank of the leaves.

    Attributes:
      shape: of one matrix in the host, without the stacked axes.
      order: its axes in the order of the matrix: those of the inputs, then those of the outputs.
      num_in: how many of them are inputs.
      stack_at: where the stacked axes begin among all axes of the host's array.
      dtype: name of the dtype that the host has; None: that of the codebook.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    num_in: int
    stack_at: int = 0
    dtype: str | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        sizes = [self.shape[axis] for axis in self.order]
        return math.prod(sizes[: self.num_in]), math.prod(sizes[self.num_in :])

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Returns one matrix [d_in, d_out] with the host's axes, in the host's dtype."""
        array = matrix.reshape([self.shape[axis] for axis in self.order])
        array = array.transpose(np.argsort(self.order))
        return array if self.dtype is None else array.astype(self.dtype)

    def to_matrix(self, array: Any) -> Any:
        """Returns one matrix [d_in, d_out] of an array with the host's axes; the inverse of `from_matrix`."""
        return array.transpose(self.order).reshape(self.matrix_shape)

    def to_stack(self, array: Any) -> Any:
        """Returns the matrices [*stack, d_in, d_out] of the host's array, its stacked axes in front."""
        stacked = array.ndim - len(self.shape)
        lead = range(self.stack_at, self.stack_at + stacked)
        rest = [axis for axis in range(array.ndim) if axis not in lead]
        order = (*lead, *(rest[axis] for axis in self.order))
        sizes = [array.shape[axis] for axis in lead]
        return array.transpose(order).reshape(*sizes, *self.matrix_shape)


def parse_axes(axes: str | None, shape: tuple[int, ...], dtype: Any, where: str) -> tuple[HostAxes, int]:
    """Returns (the axes of a kernel, the number of stacked ones).

    Args:
      axes: "names -> stacked | inputs | outputs", the names those of the array's axes in order, each in one of the
        three places: "l d n h -> l | d | n h". The stacked ones are neighbours. None: [d_in, d_out].
      shape: of the host's array.
      dtype: of the host's array.
      where: names the array in messages.

    Raises:
      InputError: a text that cannot be read, or that does not fit the shape.
    """
    name = jax.dtypes.canonicalize_dtype(dtype).name
    if axes is None:
        if len(shape) != 2:
            raise InputError(
                f"{where} has {len(shape)} axes, {shape}; say which are stacked, inputs and outputs: "
                f"axes={_example(len(shape))!r}"
            )
        return HostAxes((shape[0], shape[1]), (0, 1), 1, 0, name), 0
    names, places = _read_axes(axes, where)
    if len(names) != len(shape):
        raise InputError(f"{where} has {len(shape)} axes, {shape}; axes {axes!r} names {len(names)}")
    stacked, inputs, outputs = places
    positions = sorted(names.index(axis) for axis in stacked)
    at = positions[0] if positions else 0
    if positions != list(range(at, at + len(positions))) or positions != [names.index(axis) for axis in stacked]:
        raise InputError(f"{where}: stacked axes {' '.join(stacked)!r} must be neighbours, in the array's order")
    if at > 2:
        raise InputError(
            f"{where}: the stacked axes begin at axis {at}; a codebook and an index have two axes of their own, "
            "so they can begin at 0, 1 or 2"
        )
    rest = [axis for axis in names if axis not in stacked]
    order = tuple(rest.index(axis) for axis in (*inputs, *outputs))
    item = tuple(shape[names.index(axis)] for axis in rest)
    return HostAxes(item, order, len(inputs), at, name), len(positions)


def check_axes(axes: str) -> None:
    """Raises InputError where `axes` cannot be read; see `parse_axes`."""
    _read_axes(axes, "axes")


def _read_axes(axes: str, where: str) -> tuple[list[str], list[list[str]]]:
    left, arrow, right = axes.partition("->")
    names, places = left.split(), [place.split() for place in right.split("|")]
    wrong = None
    if not arrow or len(places) != 3:
        wrong = "it must read 'names -> stacked | inputs | outputs'"
    elif len(set(names)) != len(names):
        wrong = "a name comes twice"
    elif sorted(names) != sorted(axis for place in places for axis in place):
        wrong = "every axis must be in one of the three places"
    elif not places[1] or not places[2]:
        wrong = "inputs and outputs need an axis each"
    if wrong:
        raise InputError(f"{where}: axes is {axes!r}; {wrong}, for example 'l d n h -> l | d | n h'")
    return names, places


def _example(rank: int) -> str:
    if rank < 2:
        return "d f -> | d | f"
    names = ["l", "m", "d", "f"][-rank:] if rank <= 4 else [f"a{i}" for i in range(rank)]
    return f"{' '.join(names)} -> {' '.join(names[:-2])} | {names[-2]} | {names[-1]}"
