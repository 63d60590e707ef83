"""The kernels of one block, clustered in the order in which the block computes them.

Knows a Model's input groups and the activation streams, not where blocks come from or go to.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.drift_correction import LayerStatistics, corrected
from cluscomp_jax.clustering.error_feedback import HessianFactor, factor_hessian
from cluscomp_jax.clustering.hessian import collect_hessian_diagonals, collect_hessians, together
from cluscomp_jax.clustering.matrix import ClusterStats, SharedStart, cluster_matrix, matrix_key, matrix_size
from cluscomp_jax.clustering.tied_codebooks import fit_shared, sharing_groups
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model, run_block
from cluscomp_jax.models.sharding import Sharding, put_whole
from cluscomp_jax.models.streams import Streams
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.runtime.timing import StageTimer

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One block to be clustered, and with what; attributes as the arguments of `cluster_block`."""

    model: Model
    i: int
    rules: Mapping[str, CompressionRule]
    streams: Streams | None
    settings: ClusterConfig
    seed: int
    timer: StageTimer
    reporter: Reporter
    sharding: Sharding | None
    output_weights: Mapping[str, np.ndarray]

    def full(self, path: str) -> str:
        """Returns the whole path of a block-relative one."""
        return f"{self.model.blocks_path}/{self.i}/{path}"


def cluster_block(
    model: Model,
    i: int,
    dense: Params,
    rules: Mapping[str, CompressionRule],
    streams: Streams | None,
    settings: ClusterConfig,
    *,
    seed: int,
    timer: StageTimer,
    reporter: Reporter,
    sharding: Sharding | None = None,
    output_weights: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> tuple[Params, list[dict[str, Any]]]:
    """Returns (block i with the kernels that a rule matches as CodebookArrays, a record of each of these).

    The block stays on the host: the device holds only what the next program reads.

    Args:
      model: the decoder.
      i: the block's number.
      dense: its parameters, host arrays by block-relative paths.
      rules: {block-relative path: rule}.
      streams: inputs of the block; None: clustering without calibration.
      settings: how matrices become codebooks.
      seed: of the run.
      timer: enters a stage by name, and gives memory back between two matrices.
      reporter: is told of each finished matrix.
      sharding: of the devices that share the samples of a batch and the kernels of an input group; None: there is one.
      output_weights: {whole path: float32 [d_out] >= 0, the weights of the errors of its outputs}; of a kernel that is
        not in it all count the same.

    Raises:
      InputError: a kernel that is compressed already or not finite, by its path.
      FloatingPointError: activations that are not finite.
    """
    job = _Job(model, i, rules, streams, settings, seed, timer, reporter, sharding, output_weights)
    original, now = trees.flatten(dense), trees.flatten(dense)
    _check_kernels(job, original)
    found: dict[str, tuple[CodebookArray, ClusterStats]] = {}
    reporter.start(f"block {i + 1}/{model.num_blocks}: cluster", len(rules), "matrices")
    positions = _position_weights(job, dense)
    weights = _channel_weights(job, dense, positions)
    starts = _tied_codebooks(job, original, weights) if settings.tie_codebooks != "none" else {}
    shapes = {path: leaf.shape for path, leaf in original.items()}
    passes = statistics_passes(model, shapes, rules, settings)
    for groups in passes:
        statistics: dict[str, LayerStatistics] = {}
        if streams is not None and settings.error_feedback:
            statistics = _collect_statistics(job, groups, now, original, positions)
            if groups == passes[-1]:
                now.clear()  # no later stage reads it, and the factors of Hessians are large
        for group in groups:
            kernels = {path: original[path] for path in model.input_groups[group] if path in rules}
            factor = None
            if group in statistics:
                # Popped, as the drift would take memory next to the factor, and both are large.
                kernels, factor, diagonal = _prepared(job, group, kernels, statistics.pop(group))
                if settings.weighted:
                    weights |= dict.fromkeys(kernels, diagonal)
            task, matched = partial(_cluster, job, kernels, weights, factor, starts), list(kernels)
            for path, done in zip(matched, _in_turn(job, task, matched), strict=True):
                found[path] = done
                reporter.advance(note=path)
                timer.release()
            if settings.true_sequential and factor is not None and now:
                # Dense again, so that one program serves all blocks, however finely each is cut.
                now |= {path: jax.device_get(decode(found[path][0])) for path in matched}
    records = [_record(job.full(path), *done) for path, done in found.items()]
    return trees.unflatten(original | {path: array for path, (array, _) in found.items()}), records


def statistics_passes(
    model: Model, shapes: Mapping[str, tuple[int, ...]], rules: Collection[str], settings: ClusterConfig
) -> list[tuple[str, ...]]:
    """Returns the input groups with kernels to cluster, those of one tuple seen in one pass over the calibration.

    Args:
      model: the decoder.
      shapes: {block-relative path: shape} of the block.
      rules: block-relative paths of the kernels to cluster.
      settings: how they are.
    """
    wanted = (
        [group for group in groups if any(path in rules for path in model.input_groups[group])]
        for groups in model.independent_groups
    )
    return [names for groups in wanted for names in together(model, shapes, groups, drift=settings.corrects)]


def _check_kernels(job: _Job, flat: Mapping[str, Any]) -> None:
    for path in job.rules:
        if isinstance(flat[path], CodebookArray):
            raise InputError(f"{job.full(path)} is compressed already; begin with the original model")
        if not jnp.issubdtype(flat[path].dtype, jnp.floating):
            raise InputError(
                f"{job.full(path)} is {flat[path].dtype}; only floating weights can be clustered: multiply quantised "
                "ones by their scale first"
            )
        if not np.isfinite(np.asarray(flat[path])).all():
            raise InputError(f"{job.full(path)} holds NaN or Inf; only finite weights can be compressed")


def _check_activations(job: _Job, group: str, squares: jax.Array) -> None:
    assert job.streams is not None
    if not bool(jnp.isfinite(squares).all()):
        raise FloatingPointError(
            f"block {job.i}: the inputs of {group} are not finite in {jnp.dtype(job.streams.dtype).name}; "
            "compute in bfloat16 or float32 (tuning.compute_dtype, tuning.activation_dtype)"
        )


def _tied_codebooks(job: _Job, flat: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, SharedStart]:
    """Returns {path: initial codebook and index} of kernels with tied codebooks; `weights` are E[x_i^2], if wanted."""
    starts = dict[str, SharedStart]()
    with job.timer("cluster"):
        for paths in sharing_groups(job.model.input_groups, job.rules, job.settings.tie_codebooks):
            owner = job.full(paths[0])
            try:
                starts |= fit_shared(
                    {path: flat[path] for path in paths},
                    job.rules[paths[0]],
                    job.settings,
                    key=matrix_key(job.seed, owner),
                    channel_weights=weights,
                )
            except InputError as error:
                raise InputError(f"{owner} and those that share its codebook: {error}") from error
    return starts


def _position_weights(job: _Job, dense: Params) -> np.ndarray | None:
    """Returns float32 [samples, t], the weight of each position in the Hessian; None: all weigh the same."""
    if job.streams is None or not job.settings.weighs_positions:
        return None
    layer_type = job.model.layer_type(job.i)
    with job.timer("statistics"):
        step = partial(run_block, put_whole(dense, job.sharding), model=job.model, layer_type=layer_type)
        return job.streams.token_weights(step, job.settings.massive_activation_limit)


def _collect_statistics(
    job: _Job, groups: Sequence[str], now: dict[str, Any], original: dict[str, Any], positions: np.ndarray | None
) -> dict[str, LayerStatistics]:
    """Returns {input group: its Hessian, and how far input and residual have drifted, if that is corrected}.

    Several groups' are on the host, one group's on the device.

    Args:
      now: {path: array} of the block with what is compressed so far.
      original: the same of the original block; an array that both have is put on the device once.
      positions: the weight of each position.
    """
    assert job.streams is not None
    batches = job.streams.batches(positions, both=job.settings.corrects)
    with job.timer("statistics"):
        there = put_whole(now, job.sharding)
        wanted = None
        if job.settings.corrects:
            changed = {path: leaf for path, leaf in original.items() if leaf is not now[path]}
            wanted = trees.unflatten(there | put_whole(changed, job.sharding))
        block, layer_type = trees.unflatten(there), job.model.layer_type(job.i)
        found = _computed(collect_hessians(job.model, layer_type, groups, block, batches, original=wanted))
        held: dict[str, LayerStatistics] = jax.device_get(found) if len(groups) > 1 else found
        return held


def _channel_weights(job: _Job, dense: Params, positions: np.ndarray | None) -> dict[str, np.ndarray]:
    """Returns {path: E[x_i^2]} on the host, where all of a block's are wanted before any kernel is clustered."""
    later = job.settings.error_feedback and job.settings.tie_codebooks == "none"
    if job.streams is None or not job.settings.weighted or later:
        return {}
    with job.timer("statistics"):
        there, batches = put_whole(dense, job.sharding), job.streams.batches(positions)
        found = collect_hessian_diagonals(job.model, job.model.layer_type(job.i), there, batches)
        for group, paths in job.model.input_groups.items():
            _check_activations(job, group, found[paths[0]])
        weights: dict[str, np.ndarray] = jax.device_get(found)
        return weights


def _prepared(
    job: _Job, group: str, kernels: dict[str, Any], statistics: LayerStatistics
) -> tuple[dict[str, Any], HessianFactor, np.ndarray]:
    """Returns (the kernels after drift correction, the factor of their Hessian, its diagonal), on the host."""
    statistics = LayerStatistics(**put_whole(statistics._asdict(), job.sharding))
    _check_activations(job, group, jnp.diagonal(statistics.hessian))
    kernels, hessian = _corrected(job, kernels, statistics), statistics.hessian
    del statistics
    return kernels, _factored(job, hessian), jax.device_get(jnp.diagonal(hessian))


def _corrected(job: _Job, kernels: dict[str, Any], statistics: LayerStatistics) -> dict[str, Any]:
    """Returns the kernels moved by drift correction, on the host."""
    if not job.settings.corrects:
        return kernels
    with job.timer("statistics"):
        # Nothing here holds a corrected kernel on the device while the next one is computed.
        moved = map(jax.device_get, corrected(kernels.values(), statistics, ridge=job.settings.ridge))
        return dict(zip(kernels, moved, strict=True))


def _factored(job: _Job, hessian: jax.Array) -> HessianFactor:
    """Returns the factor of a Hessian, on the host."""
    with job.timer("statistics"):
        settings = job.settings
        factor: HessianFactor = jax.device_get(
            factor_hessian(hessian, damping=settings.damping, shrinkage=settings.shrinkage)
        )
        return factor


def _in_turn(job: _Job, task: Callable[[str], _T], paths: list[str]) -> Iterator[_T]:
    """Yields task(path) of every path in order, computed one after another, or one on each device at a time."""
    if job.sharding is None:
        for path in paths:
            with job.timer("cluster"):
                done = task(path)
            yield done
        return
    devices = list(job.sharding.mesh.devices.flat)

    def on(device: jax.Device, mine: list[str]) -> list[_T]:
        with jax.default_device(device):
            return [task(path) for path in mine]

    with job.timer("cluster"), ThreadPoolExecutor(len(devices)) as pool:
        shares = list(pool.map(on, devices, [paths[k :: len(devices)] for k in range(len(devices))]))
    for k in range(len(paths)):
        yield shares[k % len(devices)][k // len(devices)]


def _cluster(
    job: _Job,
    kernels: dict[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    factor: HessianFactor | None,
    starts: Mapping[str, SharedStart],
    path: str,
) -> tuple[CodebookArray, ClusterStats]:
    """Returns (the CodebookArray on the host, its error), and removes the kernel from `kernels`."""
    full = job.full(path)
    try:
        array, stats = cluster_matrix(
            kernels.pop(path),
            job.rules[path],
            job.settings,
            key=matrix_key(job.seed, full),
            channel_weights=weights.get(path),
            factor=factor,
            output_weights=job.output_weights.get(full),
            shared=starts.get(path),
        )
    except InputError as error:
        raise InputError(f"{full}: {error}") from error
    if array.dtype != job.settings.codebook_dtype:
        job.reporter.warn(f"{full}: kept in {array.dtype}; its codes are beyond {job.settings.codebook_dtype}")
    return jax.device_get(array), stats


def _computed(tree: _T) -> _T:
    """Returns the tree when it is there, so that its time counts as its own stage's."""
    waited: _T = jax.tree.map(lambda leaf: leaf.block_until_ready(), tree)
    return waited


def _record(path: str, array: CodebookArray, stats: ClusterStats) -> dict[str, Any]:
    size = matrix_size(path, array)
    return {**dataclasses.asdict(size), "bits_per_weight": size.bits_per_weight, **dataclasses.asdict(stats)}
