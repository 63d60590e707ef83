"""The walk over the channels of a block: what error feedback and refinement have in common, as GPU kernels take it.

From the last row to the first, a channel's codes are searched for a target that depends on the codes of the rows after
it. A scan of XLA is the definition; on a GPU it would be some hundred launches a channel. A search that can walk by
itself does it in one launch for all channels of a block (`pallas_kernels.code_walk`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from pallas_kernels.implementation import kernels_or_definition


class Rows(NamedTuple):
    """The channels of a block, r rows of c vectors of g weights.

        target_i = base_i + sum_{j>i} weights_ij delta_j,    delta_i = value_i - the codes of row i

    Attributes:
      base, value: float32 [r, c * g].
      weights: float32 [r, r].
      previous: int32 [r, c], codes that are kept unless nearer ones are found. None: there are none.
    """

    base: jax.Array
    value: jax.Array
    weights: jax.Array
    previous: jax.Array | None


@runtime_checkable
class WalkingSearch(Protocol):
    """A `CodeSearch` that has a GPU kernel for a whole block of channels."""

    def walk(
        self, rows: Rows, codebook: jax.Array, *, outputs: int, interpret: bool
    ) -> tuple[jax.Array, jax.Array] | None:
        """Returns (codes int32 [r, c], deltas float32 [r, c * g]), what is past the outputs undefined; None: no kernel.

        Args:
          rows: of a block.
          codebook: float32 [n, g].
          outputs: weights of a channel that count.
          interpret: the kernel is interpreted, on any device.
        """


Walked = tuple[jax.Array, jax.Array]


def walked(
    search: Any,
    definition: Callable[..., Walked],
    rows_of: Callable[..., Rows],
    finish: Callable[..., Walked],
    *args: Any,
    codebook: jax.Array,
    outputs: int,
) -> Walked:
    """Returns definition(search, codebook, *args), or the same by a kernel of the search in programs for a GPU.

    Args:
      search: a `CodeSearch`.
      definition: the scan over the channels.
      rows_of: (*args) -> what the kernel takes.
      finish: (codes, deltas, *args) -> what the definition returns.
      args: pytrees of arrays.
      codebook: float32 [n, g].
      outputs: weights of a channel that count.
    """
    if not isinstance(search, WalkingSearch):
        return definition(search, codebook, *args)

    def kernels(search: Any, codebook: jax.Array, *args: Any, interpret: bool) -> Walked:
        found = search.walk(rows_of(*args), codebook, outputs=outputs, interpret=interpret)
        return definition(search, codebook, *args) if found is None else finish(*found, *args)

    return kernels_or_definition(definition, kernels, search, codebook, *args)
