"""How codes are found for one input channel at a time: what error feedback and refinement ask of a coding.

Letters: o outputs, g weights per code, c = ceil(o/g) codes of a channel, n codes.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from cluscomp_jax.clustering.walk import Rows
from cluscomp_jax.kmeans import CodeIndex, build_code_index, nearest_code
from cluscomp_jax.trellis.viterbi import LANES, Trellis, best_path
from pallas_kernels.code_walk.config import path_config, walk_config

_SEGMENT = 64
"""The fewest steps of a segment of a channel that is searched in segments."""


@runtime_checkable
class CodeSearch(Protocol):
    """The search for the codes of one channel; a pytree, so that it may hold arrays."""

    def for_codebook(self, codebook: jax.Array, key: jax.Array) -> Self:
        """Returns the search among other codes [n, g]; `key` seeds what is random in it."""

    def choose(
        self, target: jax.Array, codebook: jax.Array, previous: jax.Array | None = None, *, outputs: int
    ) -> jax.Array:
        """Returns the codes int32 [c] nearest to one channel's target, as near as the search finds them.

        Args:
          target: float32 [c * g], of which the first `outputs` count.
          codebook: float32 [n, g].
          previous: int32 [c], codes that are kept unless nearer ones are found. None: there are none.
          outputs: o.
        """


@partial(jax.tree_util.register_dataclass, data_fields=["code_index"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class NearestCodes:
    """Every vector takes the code nearest to it.

    Attributes:
      code_index: search trees over the codes (`build_code_index`). None: every vector is compared with all codes.
    """

    code_index: CodeIndex | None = None

    def for_codebook(self, codebook: jax.Array, key: jax.Array) -> "NearestCodes":
        """As `CodeSearch`."""
        return NearestCodes(build_code_index(codebook, key))

    def choose(
        self, target: jax.Array, codebook: jax.Array, previous: jax.Array | None = None, *, outputs: int
    ) -> jax.Array:
        """As `CodeSearch`. A last vector that extends past the outputs is compared with all codes, by what counts."""
        g = codebook.shape[1]
        index = nearest_code(target.reshape(-1, g), codebook, self.code_index, previous)
        within = outputs % g
        if not within:
            return index
        distances = jnp.sum(jnp.square(codebook[:, :within] - target[-g:][:within]), axis=1)
        return index.at[-1].set(jnp.argmin(distances).astype(index.dtype))

    def walk(
        self, rows: Rows, codebook: jax.Array, *, outputs: int, interpret: bool
    ) -> tuple[jax.Array, jax.Array] | None:
        """As `WalkingSearch`."""
        from pallas_kernels.code_walk.nearest import SearchTrees, walk_nearest

        trees, index, (n, g) = None, self.code_index, codebook.shape
        compared = n
        if index is not None:
            grown = index.trees
            codes, order = index.codes.swapaxes(2, 3), grown.order.reshape(len(grown.order), -1)
            trees = SearchTrees(grown.directions, grown.cuts, order, codes, index.searched)
            compared = index.searched.shape[2] * codes.shape[3]
        tile = walk_config(rows.base.shape[1] // g, g, compared, listed=trees is not None)
        return walk_nearest(
            rows.base, rows.value, rows.weights, codebook, trees, rows.previous, outputs=outputs, tile=tile,
            interpret=interpret,
        )  # fmt: skip


@partial(jax.tree_util.register_dataclass, data_fields=["output_weights"], meta_fields=["trellis"])
@dataclasses.dataclass(frozen=True)
class NearestPath:
    """The codes of a channel are the windows of one stream of bits, that of nearly the least error.

    Attributes:
      trellis: L and b.
      output_weights: float32 [o] >= 0, of the squared errors of the outputs; None: 1.
    """

    trellis: Trellis
    output_weights: jax.Array | None = None

    def for_codebook(self, codebook: jax.Array, key: jax.Array) -> "NearestPath":
        """As `CodeSearch`: nothing depends on the codes."""
        return self

    def choose(
        self, target: jax.Array, codebook: jax.Array, previous: jax.Array | None = None, *, outputs: int
    ) -> jax.Array:
        """As `CodeSearch`, by Viterbi's algorithm in segments; the previous codes are kept as a whole or not at all."""
        c = target.shape[0] // codebook.shape[1]
        lanes = max(z for z in (1, LANES // 2, LANES) if z == 1 or c >= z * _SEGMENT)
        weights = self._weights(target.shape[0], outputs)
        padded = self.output_weights is not None or outputs < target.shape[0]
        found = best_path(target, codebook, self.trellis, weights=weights if padded else None, lanes=lanes)
        if previous is None:
            return found

        def error(codes: jax.Array) -> jax.Array:
            return jnp.sum(weights * jnp.square(target - codebook[codes].reshape(-1)))

        return jnp.where(error(found) < error(previous), found, previous)

    def walk(
        self, rows: Rows, codebook: jax.Array, *, outputs: int, interpret: bool
    ) -> tuple[jax.Array, jax.Array] | None:
        """As `WalkingSearch`; None where a GPU program cannot hold the codebook in its registers."""
        g, (window, step_bits) = codebook.shape[1], self.trellis
        tile = path_config(rows.base.shape[1] // g, g, window, step_bits)
        if tile is None:
            return None
        from pallas_kernels.code_walk.trellis import walk_trellis

        weights = self._weights(rows.base.shape[1], outputs)
        fixed: dict[str, Any] = {"step_bits": step_bits, "tile": tile, "interpret": interpret}
        return walk_trellis(rows.base, rows.value, rows.weights, codebook, weights, **fixed)

    def _weights(self, width: int, outputs: int) -> jax.Array:
        """Returns the weights float32 [width] of the squared errors of a channel, 0 past its outputs."""
        if self.output_weights is None:
            return (jnp.arange(width) < outputs).astype(jnp.float32)
        return jnp.pad(self.output_weights, (0, width - outputs))
