"""The kernels of one block, clustered in the order in which the block computes them.

Knows a Model's sites and the activation streams, not where blocks come from or go to.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cluscomp_jax import trees
from cluscomp_jax.cluster import ClusterStats, cluster_matrix, matrix_key, matrix_size
from cluscomp_jax.codebook import CodebookArray, decode
from cluscomp_jax.correction import SiteMoments, corrected
from cluscomp_jax.errors import InputError
from cluscomp_jax.feedback import Feedback, factorise
from cluscomp_jax.model import Model
from cluscomp_jax.progress import Reporter
from cluscomp_jax.settings import ClusterSettings, CompressionRule
from cluscomp_jax.statistics import channel_moments, site_moments
from cluscomp_jax.trees import Params
from cluscomp_jax.tuning import ActivationStore

_T = TypeVar("_T")


class Streams(NamedTuple):
    """The inputs of a block, and how they are read.

    Attributes:
      compressed: what the compressed model computes.
      original: what the original model computes, or None where nothing needs it.
      batch_size: samples at a time.
      dtype: compute dtype.
    """

    compressed: ActivationStore
    original: ActivationStore | None
    batch_size: int
    dtype: Any

    def batches(self) -> Iterator[jax.Array]:
        """Yields the compressed stream's inputs [b, t, d]."""
        for _, x in self.compressed.batches(self.batch_size):
            yield jax.device_put(x).astype(self.dtype)

    def pairs(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields inputs [b, t, d] of both streams."""
        assert self.original is not None
        for where, x in self.compressed.batches(self.batch_size):
            yield jax.device_put(x).astype(self.dtype), jax.device_put(self.original.read(where)).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class BlockClustering:
    """Clusters blocks of one run.

    Attributes:
      model: the decoder.
      settings: how matrices become codebooks.
      seed: of the run.
      clock: enters a stage by name.
      reporter: is told of each finished matrix.
    """

    model: Model
    settings: ClusterSettings
    seed: int
    clock: Callable[[str], AbstractContextManager[None]]
    reporter: Reporter

    def __call__(
        self, i: int, dense: Params, rules: Mapping[str, CompressionRule], streams: Streams | None
    ) -> tuple[Params, list[dict[str, Any]]]:
        """Returns (block i with the kernels that a rule matches as CodebookArrays, a record of each of these).

        Args:
          i: the block's number.
          dense: its parameters, block-relative paths.
          rules: {block-relative path: rule}.
          streams: inputs of the block; None: clustering without calibration.

        Raises:
          InputError: a kernel that is not finite, by its path.
        """
        flat, now, records = trees.flatten(dense), trees.flatten(dense), []
        self.reporter.start(f"block {i + 1}/{self.model.num_blocks}: cluster", len(rules), "matrices")
        kind = self.model.block_kind(i)
        weights = self._channel_weights(kind, dense, streams)
        last = list(self.model.sites)[-1]
        for site, paths in self.model.sites.items():
            kernels = {path: flat[path] for path in paths if path in rules}
            feedback = None
            if kernels and streams is not None and self.settings.feedback:
                moments = self._moments(kind, site, trees.unflatten(now), dense, streams)
                if site == last:
                    now.clear()  # nothing reads it any more, and the roots of the moments are large
                kernels, diagonal, feedback = self._prepare(kernels, moments)
                weights |= dict.fromkeys(kernels, diagonal) if self.settings.weighted else {}
                del moments
            for path in list(kernels):
                full = f"{self.model.blocks_path}/{i}/{path}"
                with self.clock("cluster"):
                    flat[path], stats = self._cluster(full, kernels.pop(path), rules[path], weights.get(path), feedback)
                records.append(_record(full, flat[path], stats))
                self.reporter.advance(note=path)
                if self.settings.sequential and now:
                    # Dense again, so that one program serves all blocks, however finely each is cut.
                    now[path] = decode(flat[path])
        return trees.unflatten(flat), records

    def _channel_weights(self, kind: Hashable, dense: Params, streams: Streams | None) -> dict[str, jax.Array]:
        """Returns {path: E[x_i^2]} where they are all that is wanted."""
        if streams is None or self.settings.feedback or not self.settings.weighted:
            return {}
        with self.clock("statistics"):
            return _computed(channel_moments(self.model, kind, dense, streams.batches()))

    def _moments(self, kind: Hashable, site: str, now: Params, dense: Params, streams: Streams) -> SiteMoments:
        """Returns the moments of a site's input; `now` is the block as the compressed stream sees it."""
        with self.clock("statistics"):
            if self.settings.corrects:
                return _computed(site_moments(self.model, kind, site, now, streams.pairs(), original=dense))
            return _computed(site_moments(self.model, kind, site, now, streams.batches()))

    def _prepare(
        self, kernels: dict[str, jax.Array], moments: SiteMoments
    ) -> tuple[dict[str, jax.Array], jax.Array, Feedback]:
        """Returns (the kernels as they should be clustered, E[x_i^2] of their input, what feedback needs)."""
        with self.clock("statistics"):
            if self.settings.corrects:
                kernels = {path: corrected(w, moments, ridge=self.settings.ridge) for path, w in kernels.items()}
            feedback = factorise(moments.inputs, damping=self.settings.damping)
            return _computed((kernels, jnp.diagonal(moments.inputs), feedback))

    def _cluster(
        self,
        path: str,
        weight: jax.Array,
        rule: CompressionRule,
        channel_weights: jax.Array | None,
        feedback: Feedback | None,
    ) -> tuple[CodebookArray, ClusterStats]:
        key = matrix_key(self.seed, path)
        try:
            return cluster_matrix(
                weight, rule, self.settings, key=key, channel_weights=channel_weights, feedback=feedback
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _computed(tree: _T) -> _T:
    """Returns the tree when it is there, so that its time counts as its own stage's."""
    waited: _T = jax.tree.map(lambda leaf: leaf.block_until_ready(), tree)
    return waited


def _record(path: str, array: CodebookArray, stats: ClusterStats) -> dict[str, Any]:
    size = matrix_size(path, array)
    return {**dataclasses.asdict(size), "bits_per_weight": size.bits_per_weight, **dataclasses.asdict(stats)}
