"""One matrix at a time: dense kernel to CodebookArray and back, and the stored size of a compressed tree.

Knows matrices and trees, no models.
"""

import dataclasses
import math
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.code_search import CodeSearch
from cluscomp_jax.clustering.coders import coder_of, search_of
from cluscomp_jax.clustering.error_feedback import HessianFactor, assign_with_error_feedback
from cluscomp_jax.clustering.refine import refine
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.core import codebook as cb
from cluscomp_jax.core import pytrees
from cluscomp_jax.core.caller_mesh import on_one_device
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import Axis, stored_bits
from cluscomp_jax.errors import InputError

NOT_IN = (
    "axis 'in' takes neither activation weights nor error feedback: its vectors span input channels of different "
    "weight; set weighted = false and error_feedback = false (--unweighted), or axis = 'out'"
)


class SharedStart(NamedTuple):
    """The codebook and first codes of a kernel whose codebook is shared; on the host.

    Attributes:
      owner: block-relative path of the kernel that stores the codebook; None: this one.
      codebook: [n, g], 16 bit.
      codes: int32 [m], the code nearest to each of the kernel's vectors.
      seconds: wall time of the codebook's k-means, where this kernel stores the codebook; else 0.
    """

    owner: str | None
    codebook: np.ndarray
    codes: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True)
class ClusterStats:
    """How well a matrix was clustered.

    Attributes:
      relative_error: ||W - decode||^2 / ||W||^2, W the kernel as it was given.
      weighted_error: the same with each input channel weighted, or None without weights.
      seconds: wall time, compilation included.
    """

    relative_error: float
    weighted_error: float | None
    seconds: float


def cluster_matrix(
    weight: jax.Array | np.ndarray,
    rule: CompressionRule,
    settings: ClusterConfig,
    *,
    key: jax.Array,
    channel_weights: jax.Array | np.ndarray | None = None,
    factor: HessianFactor | None = None,
    output_weights: jax.Array | np.ndarray | None = None,
    shared: SharedStart | None = None,
) -> tuple[CodebookArray, ClusterStats]:
    """Returns the CodebookArray of a kernel [d_in, d_out] and its error; the codebook is already 16 bit.

    Args:
      weight: [d_in, d_out], finite. Arrays of the host, weight or factor, are on the device only while they are used:
        k-means, which needs the most memory, then has the device to itself.
      rule: gives g, num_codes, axis and coding; its pattern is not read.
      settings: iterations, codebook_dtype and, with error feedback, refine_rounds are used.
      key: same key, same bytes.
      channel_weights: [d_in] >= 0, weight of each input channel's error (E[x_i^2]); axis "out" only.
      factor: of the Hessian of the kernel's input. With it, codes are chosen by error feedback, and codes and codebook
        are improved by refine rounds; axis "out" only. None: every vector takes its nearest code.
      output_weights: [d_out] >= 0, weight of each output's error; axis "out" only. Plain codes, which choose by vector,
        do not take them into account.
      shared: the codebook of several kernels, which stays unchanged. None: k-means of this kernel's vectors makes one.

    Raises:
      InputError: weights that are not finite, channel weights or a factor for axis "in", or a factor for a coding that
        has no error feedback.
    """
    if rule.axis != "out" and not (factor is None and channel_weights is None and output_weights is None):
        raise InputError(NOT_IN)
    began, owner, coder = time.monotonic(), None, coder_of(rule)
    weight, channel_weights = on_one_device(weight), on_one_device(channel_weights)
    weights: dict[str, Any] = {}
    if coder.weighs_outputs and output_weights is not None:
        weights = {"output_weights": jnp.asarray(on_one_device(output_weights), jnp.float32)}
    if not bool((jnp if isinstance(weight, jax.Array) else np).isfinite(weight).all()):
        raise InputError("the weights hold NaN or Inf; only finite ones can be clustered")
    if shared is None:
        exact, codes = coder.fit(
            weight, rule, channel_weights, key=key, iterations=settings.iterations, codes=factor is None, **weights
        )
        rounded = cb.round_codebook(exact, settings.codebook_dtype)
        del exact
    else:
        began -= shared.seconds
        owner, rounded, codes = shared.owner, jnp.asarray(shared.codebook), jnp.asarray(shared.codes)
    if factor is not None:
        del codes  # all are chosen anew
        solve = shared is None
        search = search_of(rule, **weights)
        rounded, codes = _with_error_feedback(weight, rounded, factor, search, settings, key, solve, **weights)
    form = rule.form((weight.shape[0], weight.shape[1]))
    assert codes is not None
    codes = codes.reshape(form.along(form.vectors))  # the flat ones are let go of
    index = cb.index_arrays(codes, form=form, coding=rule.coding)
    array = CodebookArray(rounded, index, form.matrix_shape, rule.axis, owner, coding=rule.coding)
    plain, weighted = relative_errors(jax.device_put(weight), array, channel_weights)
    return array, ClusterStats(plain, weighted, time.monotonic() - began)


def _with_error_feedback(
    weight: jax.Array | np.ndarray,
    codebook: jax.Array,
    factor: HessianFactor,
    search: CodeSearch,
    settings: ClusterConfig,
    key: jax.Array,
    solve: bool,
    output_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (codebook, rounded; codes) of error feedback and refine rounds; `solve`: of the codebook too."""
    on_device: jax.Array = jax.device_put(weight)
    factor = jax.device_put(factor)
    search = search.for_codebook(codebook, key)
    refined, codes = refine(
        on_device,
        codebook,
        assign_with_error_feedback(on_device, codebook, factor, search),
        factor,
        search,
        rounds=settings.refine_rounds,
        key=key,
        solve=solve,
        output_weights=output_weights,
    )
    return cb.round_codebook(refined, settings.codebook_dtype), codes


def relative_errors(weight: jax.Array, array: CodebookArray, channel_weights: Any = None) -> tuple[float, float | None]:
    """Returns (relative squared error, the same weighted by input channel or None)."""
    mass = jnp.ones((weight.shape[0],), jnp.float32) if channel_weights is None else jnp.asarray(channel_weights)
    error, energy, weighted_error, weighted_energy = jax.device_get(channel_energies(weight, array, mass))
    plain = 0.0 if energy == 0 else float(error / energy)
    if channel_weights is None:
        return plain, None
    return plain, 0.0 if weighted_energy == 0 else float(weighted_error / weighted_energy)


@jax.jit
def channel_energies(weight: jax.Array, array: CodebookArray, mass: jax.Array) -> tuple[jax.Array, ...]:
    """Returns error and energy of every input channel, plain and weighted by `mass`, float32 [d_in] each."""
    weight = weight.astype(jnp.float32)
    error = jnp.sum(jnp.square(weight - cb.decode(array).astype(jnp.float32)), axis=1)
    energy = jnp.sum(jnp.square(weight), axis=1)
    return jnp.sum(error), jnp.sum(energy), jnp.sum(error * mass), jnp.sum(energy * mass)


def matrix_key(seed: int, path: str) -> jax.Array:
    """Returns the key of the matrix at `path`: it does not depend on which other matrices are compressed."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))


def decompress(tree: Any) -> Any:
    """Returns the pytree with every CodebookArray decoded: a plain array of its `shape` and `dtype`."""
    return pytrees.map_by_path(lambda _, leaf: cb.decode(leaf) if isinstance(leaf, CodebookArray) else leaf, tree)


@dataclasses.dataclass(frozen=True)
class MatrixSize:
    """Stored size of one compressed matrix, or of a stack of them.

    Attributes:
      path: of the kernel.
      shape: the host's; (d_in, d_out) of a plain matrix.
      axis, g, num_codes: of every matrix.
      bits: of all of them.
      step_bits: of a trellis index; None: of other indices.
    """

    path: str
    shape: tuple[int, ...]
    axis: Axis
    g: int
    num_codes: int
    bits: int
    step_bits: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, codebook included, over the number of weights."""
        return self.bits / math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """Stored size of a params tree: packed indices, 16-bit codebooks, everything else in its own dtype.

    Attributes:
      matrices: the compressed matrices.
      dense_bytes: bytes of all other parameters.
    """

    matrices: tuple[MatrixSize, ...]
    dense_bytes: int

    @property
    def compressed_bytes(self) -> int:
        """Bytes of all compressed matrices."""
        return sum(-(-matrix.bits // 8) for matrix in self.matrices)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.compressed_bytes + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, of the compressed matrices together; 0 if there are none."""
        weights = sum(math.prod(matrix.shape) for matrix in self.matrices)
        return sum(matrix.bits for matrix in self.matrices) / weights if weights else 0.0


def matrix_size(path: str, array: CodebookArray) -> MatrixSize:
    """Returns the stored size of one CodebookArray; a codebook counts where the array has its own."""
    bits = math.prod(array.stack) * stored_bits(array.form, array.coding, own=array.tied_to is None)
    sizes = (array.group_size, array.num_codes, bits)
    return MatrixSize(path, array.shape, array.axis, *sizes, getattr(array.coding, "step_bits", None))


def size_report(tree: Any) -> SizeReport:
    """Returns the stored size of a pytree of arrays and CodebookArrays."""
    matrices, dense_bytes = [], 0
    for path, leaf in pytrees.iterate(tree):
        if isinstance(leaf, CodebookArray):
            matrices.append(matrix_size(path, leaf))
        elif hasattr(leaf, "shape") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            dense_bytes += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return SizeReport(tuple(matrices), dense_bytes)
