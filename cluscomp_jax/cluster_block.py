"""The kernels of one block, clustered in the order in which the block computes them.

Knows a Model's sites and the activation streams, not where blocks come from or go to.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax import trees
from cluscomp_jax.cluster import ClusterStats, cluster_matrix, matrix_key, matrix_size
from cluscomp_jax.codebook import CodebookArray, decode
from cluscomp_jax.correction import SiteMoments, corrected
from cluscomp_jax.errors import InputError
from cluscomp_jax.feedback import Feedback, factorise
from cluscomp_jax.losses import position_weights
from cluscomp_jax.model import Model, run_block
from cluscomp_jax.progress import Reporter
from cluscomp_jax.settings import ClusterSettings, CompressionRule
from cluscomp_jax.sharding import Sharding, put_samples
from cluscomp_jax.statistics import Batch, channel_moments, site_moments
from cluscomp_jax.trees import Params
from cluscomp_jax.tuning import ActivationStore

_T = TypeVar("_T")
_weigh = jax.jit(position_weights, static_argnames="limit")


class Streams(NamedTuple):
    """The inputs of a block, and how they are read.

    Attributes:
      compressed: what the compressed model computes.
      original: what the original model computes, or None where nothing needs it.
      batch_size: samples at a time.
      dtype: compute dtype.
      sharding: of the samples of a batch, where several devices share them.
    """

    compressed: ActivationStore
    original: ActivationStore | None
    batch_size: int
    dtype: Any
    sharding: Sharding | None = None

    def inputs(self) -> Iterator[jax.Array]:
        """Yields the compressed stream's inputs [b, t, d]."""
        for _, x in self.compressed.batches(self.batch_size):
            yield self._on_device(x)

    def batches(self, weights: np.ndarray | None) -> Iterator[Batch]:
        """Yields inputs of both streams; `weights` [samples, t] is what each position counts."""
        for where, x in self.compressed.batches(self.batch_size):
            original = None if self.original is None else self._on_device(self.original.read(where))
            counted = None if weights is None else put_samples(weights[where], self.sharding)
            yield Batch(self._on_device(x), original, counted)

    def position_weights(self, block: Callable[[jax.Array], jax.Array], limit: float) -> np.ndarray | None:
        """Returns float32 [samples, t], what each position counts by its output of the original block."""
        if not limit:
            return None
        stream = self.compressed if self.original is None else self.original
        return np.concatenate(
            [np.asarray(_weigh(block(self._on_device(x)), limit=limit)) for _, x in stream.batches(self.batch_size)]
        )

    def _on_device(self, x: np.ndarray) -> jax.Array:
        return put_samples(x, self.sharding).astype(self.dtype)


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
        positions = None
        if streams is not None and self.settings.feedback:
            with self.clock("statistics"):
                step = partial(run_block, dense, model=self.model, kind=kind)
                positions = streams.position_weights(step, self.settings.outlier_limit)
        last = list(self.model.sites)[-1]
        for site, paths in self.model.sites.items():
            kernels = {path: flat[path] for path in paths if path in rules}
            feedback = None
            if kernels and streams is not None and self.settings.feedback:
                original = dense if self.settings.corrects else None
                with self.clock("statistics"):
                    batches = streams.batches(positions)
                    moments = _computed(
                        site_moments(self.model, kind, site, trees.unflatten(now), batches, original=original)
                    )
                if site == last:
                    now.clear()  # nothing reads it any more, and the roots of the moments are large
                kernels, inputs = self._corrected(kernels, moments), moments.inputs
                del moments  # the rest of them would lie beside the root, and both are large
                feedback = self._factorised(inputs)
                weights |= dict.fromkeys(kernels, jnp.diagonal(inputs)) if self.settings.weighted else {}
                del inputs
            for path in list(kernels):
                full = f"{self.model.blocks_path}/{i}/{path}"
                with self.clock("cluster"):
                    flat[path], stats = self._cluster(full, kernels.pop(path), rules[path], weights.get(path), feedback)
                records.append(_record(full, flat[path], stats))
                self.reporter.advance(note=path)
                if self.settings.sequential and feedback is not None and now:
                    # Dense again, so that one program serves all blocks, however finely each is cut.
                    now[path] = decode(flat[path])
        return trees.unflatten(flat), records

    def _channel_weights(self, kind: Hashable, dense: Params, streams: Streams | None) -> dict[str, jax.Array]:
        """Returns {path: E[x_i^2]} where they are all that is wanted."""
        if streams is None or self.settings.feedback or not self.settings.weighted:
            return {}
        with self.clock("statistics"):
            return _computed(channel_moments(self.model, kind, dense, streams.inputs()))

    def _corrected(self, kernels: dict[str, jax.Array], moments: SiteMoments) -> dict[str, jax.Array]:
        """Returns the kernels as they should be clustered."""
        if not self.settings.corrects:
            return kernels
        with self.clock("statistics"):
            ridge = self.settings.ridge
            return _computed({path: corrected(w, moments, ridge=ridge) for path, w in kernels.items()})

    def _factorised(self, inputs: jax.Array) -> Feedback:
        """Returns what feedback needs of the second moments of a site's input."""
        with self.clock("statistics"):
            return _computed(factorise(inputs, damping=self.settings.damping))

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
