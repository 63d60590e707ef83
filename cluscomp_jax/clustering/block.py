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

from cluscomp_jax.clustering.drift_correction import LayerStatistics, corrected
from cluscomp_jax.clustering.error_feedback import HessianFactor, factor_hessian
from cluscomp_jax.clustering.hessian import Batch, collect_hessian_diagonals, collect_hessians
from cluscomp_jax.clustering.matrix import ClusterStats, SharedStart, cluster_matrix, matrix_key, matrix_size
from cluscomp_jax.clustering.tied_codebooks import fit_shared, sharing_groups
from cluscomp_jax.config.settings import ClusterConfig, CompressionRule
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.losses import token_weights
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.activations import ActivationStore
from cluscomp_jax.models.model import Model, run_block
from cluscomp_jax.models.sharding import Sharding, put_samples, put_whole
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.runtime.timing import StageTimer

_T = TypeVar("_T")
weigh_tokens = jax.jit(token_weights, static_argnames="limit")


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

    def token_weights(self, block: Callable[[jax.Array], jax.Array], limit: float) -> np.ndarray | None:
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
    settings: ClusterConfig
    seed: int
    clock: StageTimer
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
        layer_type = self.model.layer_type(i)
        positions = self._position_weights(layer_type, dense, streams)
        weights = self._channel_weights(i, dense, streams, positions)
        starts = self._tied_codebooks(i, original, rules, weights) if self.settings.tie_codebooks != "none" else {}
        last = list(self.model.input_groups)[-1]
        for group, paths in self.model.input_groups.items():
            kernels = {path: original[path] for path in paths if path in rules}
            factor = None
            if kernels and streams is not None and self.settings.error_feedback:
                batches = streams.batches(positions, both=self.settings.corrects)
                statistics = self._collect_statistics(layer_type, group, now, original, batches)
                self._check_activations(i, group, jnp.diagonal(statistics.hessian), streams)
                if group == last:
                    now.clear()  # nothing reads it any more, and the roots of the moments are large
                kernels, inputs = self._corrected(kernels, statistics), statistics.hessian
                del statistics  # the rest of them would lie beside the root, and both are large
                factor = self._factorised(inputs)
                if self.settings.weighted:
                    weights |= dict.fromkeys(kernels, jax.device_get(jnp.diagonal(inputs)))
                del inputs
            task, matched = partial(self._cluster, i, kernels, rules, weights, factor, starts), list(kernels)
            for path, done in zip(matched, self._in_turn(task, matched), strict=True):
                found[path] = done
                self.reporter.advance(note=path)
                self.clock.release()
            if self.settings.true_sequential and factor is not None and now:
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

    def _check_activations(self, i: int, group: str, squares: jax.Array, streams: Streams) -> None:
        if not bool(jnp.isfinite(squares).all()):
            raise FloatingPointError(
                f"block {i}: the inputs of {group} are not finite in {jnp.dtype(streams.dtype).name}; "
                "compute in bfloat16 or float32 (tuning.compute_dtype, tuning.activation_dtype)"
            )

    def _tied_codebooks(
        self,
        i: int,
        flat: Mapping[str, Any],
        rules: Mapping[str, CompressionRule],
        weights: Mapping[str, np.ndarray],
    ) -> dict[str, SharedStart]:
        """Returns {path: what it begins with} of kernels that share a codebook; `weights` are E[x_i^2] where wanted."""
        starts = dict[str, SharedStart]()
        with self.clock("cluster"):
            for group in sharing_groups(self.model.input_groups, rules, self.settings.tie_codebooks):
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

    def _position_weights(self, layer_type: Hashable, dense: Params, streams: Streams | None) -> np.ndarray | None:
        """Returns float32 [samples, t], what each position counts in second moments, or None where all count alike."""
        if streams is None or not self.settings.error_feedback:
            return None
        with self.clock("statistics"):
            step = partial(run_block, put_whole(dense, self.sharding), model=self.model, layer_type=layer_type)
            return streams.token_weights(step, self.settings.massive_activation_limit)

    def _collect_statistics(
        self, layer_type: Hashable, group: str, now: dict[str, Any], original: dict[str, Any], batches: Iterator[Batch]
    ) -> LayerStatistics:
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
            return _computed(collect_hessians(self.model, layer_type, group, block, batches, original=wanted))

    def _channel_weights(
        self, i: int, dense: Params, streams: Streams | None, positions: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Returns {path: E[x_i^2]} on the host, where all of a block's are wanted before any kernel is clustered."""
        if (
            streams is None
            or not self.settings.weighted
            or (self.settings.error_feedback and self.settings.tie_codebooks == "none")
        ):
            return {}
        with self.clock("statistics"):
            there, batches = put_whole(dense, self.sharding), streams.batches(positions)
            found = collect_hessian_diagonals(self.model, self.model.layer_type(i), there, batches)
            for group, paths in self.model.input_groups.items():
                self._check_activations(i, group, found[paths[0]], streams)
            weights: dict[str, np.ndarray] = jax.device_get(found)
            return weights

    def _corrected(self, kernels: dict[str, jax.Array], statistics: LayerStatistics) -> dict[str, jax.Array]:
        """Returns the kernels as they should be clustered, on the host."""
        if not self.settings.corrects:
            return kernels
        with self.clock("statistics"):
            ridge = self.settings.ridge
            return {path: jax.device_get(corrected(w, statistics, ridge=ridge)) for path, w in kernels.items()}

    def _factorised(self, inputs: jax.Array) -> HessianFactor:
        """Returns what feedback needs of the second moments of a site's input, on the host."""
        with self.clock("statistics"):
            factor: HessianFactor = jax.device_get(factor_hessian(inputs, damping=self.settings.damping))
            return factor

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
        factor: HessianFactor | None,
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
                factor=factor,
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
