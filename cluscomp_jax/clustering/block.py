"""The kernels of one block, clustered in the order in which the block computes them.

Knows a Model's sites and the activation streams, not where blocks come from or go to.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.drift_correction import SiteMoments, corrected
from cluscomp_jax.clustering.error_feedback import Feedback, factorise
from cluscomp_jax.clustering.hessian import Batch, channel_moments, site_moments
from cluscomp_jax.clustering.matrix import ClusterStats, SharedStart, cluster_matrix, matrix_key, matrix_size
from cluscomp_jax.clustering.tied_codebooks import fit_shared, sharing_groups
from cluscomp_jax.config.settings import ClusterSettings, CompressionRule
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.losses import position_weights
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.activations import ActivationStore
from cluscomp_jax.models.model import Model, run_block
from cluscomp_jax.models.sharding import Sharding, put_samples, put_whole
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.runtime.timing import StageClock

_T = TypeVar("_T")
weigh_tokens = jax.jit(position_weights, static_argnames="limit")


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

    def batches(self, weights: np.ndarray | None, *, both: bool = False) -> Iterator[Batch]:
        """Yields inputs of the compressed stream; `weights` [samples, t] is what each position counts.

        Args:
          both: of the original stream too.
        """
        for where, x in self.compressed.batches(self.batch_size):
            original = self._on_device(self.original.read(where)) if both and self.original is not None else None
            counted = None if weights is None else put_samples(weights[where], self.sharding)
            yield Batch(self._on_device(x), original, counted)

    def position_weights(self, block: Callable[[jax.Array], jax.Array], limit: float) -> np.ndarray | None:
        """Returns float32 [samples, t], what each position counts by its output of the original block."""
        if not limit:
            return None
        stream = self.compressed if self.original is None else self.original
        return np.concatenate(
            [
                np.asarray(weigh_tokens(block(self._on_device(x)), limit=limit))
                for _, x in stream.batches(self.batch_size)
            ]
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
      clock: enters a stage by name, and gives memory back between two matrices.
      reporter: is told of each finished matrix.
      sharding: of the devices that share the samples of a batch and the kernels of a site; None: there is one.
    """

    model: Model
    settings: ClusterSettings
    seed: int
    clock: StageClock
    reporter: Reporter
    sharding: Sharding | None = None

    def __call__(
        self, i: int, dense: Params, rules: Mapping[str, CompressionRule], streams: Streams | None
    ) -> tuple[Params, list[dict[str, Any]]]:
        """Returns (block i with the kernels that a rule matches as CodebookArrays, a record of each of these).

        The block waits on the host: on the device lies only what the next program reads.

        Args:
          i: the block's number.
          dense: its parameters, host arrays by block-relative paths.
          rules: {block-relative path: rule}.
          streams: inputs of the block; None: clustering without calibration.

        Raises:
          InputError: a kernel that is compressed already or not finite, by its path.
          FloatingPointError: activations that are not finite.
        """
        original, now = trees.flatten(dense), trees.flatten(dense)
        self._check_kernels(i, original, rules)
        found: dict[str, tuple[CodebookArray, ClusterStats]] = {}
        self.reporter.start(f"block {i + 1}/{self.model.num_blocks}: cluster", len(rules), "matrices")
        kind = self.model.block_kind(i)
        positions = self._position_weights(kind, dense, streams)
        weights = self._channel_weights(i, dense, streams, positions)
        starts = self._shared_starts(i, original, rules, weights) if self.settings.share != "none" else {}
        last = list(self.model.sites)[-1]
        for site, paths in self.model.sites.items():
            kernels = {path: original[path] for path in paths if path in rules}
            feedback = None
            if kernels and streams is not None and self.settings.feedback:
                batches = streams.batches(positions, both=self.settings.corrects)
                moments = self._moments(kind, site, now, original, batches)
                self._check_activations(i, site, jnp.diagonal(moments.inputs), streams)
                if site == last:
                    now.clear()  # nothing reads it any more, and the roots of the moments are large
                kernels, inputs = self._corrected(kernels, moments), moments.inputs
                del moments  # the rest of them would lie beside the root, and both are large
                feedback = self._factorised(inputs)
                if self.settings.weighted:
                    weights |= dict.fromkeys(kernels, jax.device_get(jnp.diagonal(inputs)))
                del inputs
            task, matched = partial(self._cluster, i, kernels, rules, weights, feedback, starts), list(kernels)
            for path, done in zip(matched, self._in_turn(task, matched), strict=True):
                found[path] = done
                self.reporter.advance(note=path)
                self.clock.release()
            if self.settings.sequential and feedback is not None and now:
                # Dense again, so that one program serves all blocks, however finely each is cut.
                now |= {path: jax.device_get(decode(found[path][0])) for path in matched}
        records = [_record(f"{self.model.blocks_path}/{i}/{path}", *done) for path, done in found.items()]
        return trees.unflatten(original | {path: array for path, (array, _) in found.items()}), records

    def _check_kernels(self, i: int, flat: Mapping[str, Any], rules: Mapping[str, CompressionRule]) -> None:
        for path in rules:
            full = f"{self.model.blocks_path}/{i}/{path}"
            if isinstance(flat[path], CodebookArray):
                raise InputError(f"{full} is compressed already; begin with the original model")
            if not np.isfinite(np.asarray(flat[path])).all():
                raise InputError(f"{full} holds NaN or Inf; only finite weights can be compressed")

    def _check_activations(self, i: int, site: str, squares: jax.Array, streams: Streams) -> None:
        if not bool(jnp.isfinite(squares).all()):
            raise FloatingPointError(
                f"block {i}: the inputs of {site} are not finite in {jnp.dtype(streams.dtype).name}; "
                "compute in bfloat16 or float32 (tuning.compute_dtype, tuning.activation_dtype)"
            )

    def _shared_starts(
        self,
        i: int,
        flat: Mapping[str, Any],
        rules: Mapping[str, CompressionRule],
        weights: Mapping[str, np.ndarray],
    ) -> dict[str, SharedStart]:
        """Returns {path: what it begins with} of kernels that share a codebook; `weights` are E[x_i^2] where wanted."""
        starts = dict[str, SharedStart]()
        with self.clock("cluster"):
            for group in sharing_groups(self.model.sites, rules, self.settings.share):
                full = f"{self.model.blocks_path}/{i}/{group[0]}"
                try:
                    starts |= fit_shared(
                        {path: flat[path] for path in group},
                        rules[group[0]],
                        self.settings,
                        key=matrix_key(self.seed, full),
                        channel_weights=weights,
                    )
                except InputError as error:
                    raise InputError(f"{full} and those that share its codebook: {error}") from error
        return starts

    def _position_weights(self, kind: Hashable, dense: Params, streams: Streams | None) -> np.ndarray | None:
        """Returns float32 [samples, t], what each position counts in second moments, or None where all count alike."""
        if streams is None or not self.settings.feedback:
            return None
        with self.clock("statistics"):
            step = partial(run_block, put_whole(dense, self.sharding), model=self.model, kind=kind)
            return streams.position_weights(step, self.settings.outlier_limit)

    def _moments(
        self, kind: Hashable, site: str, now: dict[str, Any], original: dict[str, Any], batches: Iterator[Batch]
    ) -> SiteMoments:
        """Returns the moments of a site.

        Args:
          now: {path: array} of the block as it is by now.
          original: the same as it was; an array that is still the same one is put on the device once.
        """
        with self.clock("statistics"):
            there = put_whole(now, self.sharding)
            wanted = None
            if self.settings.corrects:
                changed = {path: leaf for path, leaf in original.items() if leaf is not now[path]}
                wanted = trees.unflatten(there | put_whole(changed, self.sharding))
            block = trees.unflatten(there)
            return _computed(site_moments(self.model, kind, site, block, batches, original=wanted))

    def _channel_weights(
        self, i: int, dense: Params, streams: Streams | None, positions: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Returns {path: E[x_i^2]} on the host, where all of a block's are wanted before any kernel is clustered."""
        if streams is None or not self.settings.weighted or (self.settings.feedback and self.settings.share == "none"):
            return {}
        with self.clock("statistics"):
            there, batches = put_whole(dense, self.sharding), streams.batches(positions)
            found = channel_moments(self.model, self.model.block_kind(i), there, batches)
            for site, paths in self.model.sites.items():
                self._check_activations(i, site, found[paths[0]], streams)
            weights: dict[str, np.ndarray] = jax.device_get(found)
            return weights

    def _corrected(self, kernels: dict[str, jax.Array], moments: SiteMoments) -> dict[str, jax.Array]:
        """Returns the kernels as they should be clustered, on the host."""
        if not self.settings.corrects:
            return kernels
        with self.clock("statistics"):
            ridge = self.settings.ridge
            return {path: jax.device_get(corrected(w, moments, ridge=ridge)) for path, w in kernels.items()}

    def _factorised(self, inputs: jax.Array) -> Feedback:
        """Returns what feedback needs of the second moments of a site's input, on the host."""
        with self.clock("statistics"):
            feedback: Feedback = jax.device_get(factorise(inputs, damping=self.settings.damping))
            return feedback

    def _in_turn(self, task: Callable[[str], _T], paths: list[str]) -> Iterator[_T]:
        """Yields task(path) of every path in order, computed one after the other, or side by side where devices are."""
        if self.sharding is None:
            for path in paths:
                with self.clock("cluster"):
                    done = task(path)
                yield done
            return
        devices = list(self.sharding.mesh.devices.flat)

        def on(device: jax.Device, mine: list[str]) -> list[_T]:
            with jax.default_device(device):
                return [task(path) for path in mine]

        with self.clock("cluster"), ThreadPoolExecutor(len(devices)) as pool:
            shares = list(pool.map(on, devices, [paths[k :: len(devices)] for k in range(len(devices))]))
        for k in range(len(paths)):
            yield shares[k % len(devices)][k // len(devices)]

    def _cluster(
        self,
        i: int,
        kernels: dict[str, np.ndarray],
        rules: Mapping[str, CompressionRule],
        weights: Mapping[str, np.ndarray],
        feedback: Feedback | None,
        starts: Mapping[str, SharedStart],
        path: str,
    ) -> tuple[CodebookArray, ClusterStats]:
        """Returns (the CodebookArray on the host, its error), and forgets the kernel."""
        full = f"{self.model.blocks_path}/{i}/{path}"
        try:
            array, stats = cluster_matrix(
                kernels.pop(path),
                rules[path],
                self.settings,
                key=matrix_key(self.seed, full),
                channel_weights=weights.get(path),
                feedback=feedback,
                shared=starts.get(path),
            )
        except InputError as error:
            raise InputError(f"{full}: {error}") from error
        if array.dtype != self.settings.codebook_dtype:
            self.reporter.warn(f"{full}: kept in {array.dtype}; its codes are beyond {self.settings.codebook_dtype}")
        return jax.device_get(array), stats


def _computed(tree: _T) -> _T:
    """Returns the tree when it is there, so that its time counts as its own stage's."""
    waited: _T = jax.tree.map(lambda leaf: leaf.block_until_ready(), tree)
    return waited


def _record(path: str, array: CodebookArray, stats: ClusterStats) -> dict[str, Any]:
    size = matrix_size(path, array)
    return {**dataclasses.asdict(size), "bits_per_weight": size.bits_per_weight, **dataclasses.asdict(stats)}
