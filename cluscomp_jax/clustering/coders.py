"""How a kernel gets its first codes, by the coding of its index: the other half of `core.coding`.

A coding that the core reads needs a coder here, or registered from elsewhere, to be chosen by a rule.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax import kmeans
from cluscomp_jax.clustering.code_search import CodeSearch, NearestCodes, NearestPath
from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core.coding import Axis
from cluscomp_jax.errors import InputError
from cluscomp_jax.trellis.fit import best_codes, fit_codebook
from cluscomp_jax.trellis.viterbi import Trellis
from pallas_kernels.codebook_matmul import window_bits


class Coder(NamedTuple):
    """The functions that choose codes for one coding.

    Attributes:
      fit: (weight [d_in, d_out], rule, channel weights [d_in] or None, key=, iterations=, codes=) -> (codebook float32
        [n, g], the codes int32 of every vector in the shape of the coding's `codes`); None in place of codes that
        `codes=False` does not ask for and that cost something.
      search: the codes of one channel at a time, for error feedback; None: the coding has none.
      weighs_outputs: whether both also take `output_weights=` [d_out] >= 0, or None: of the squared errors.
    """

    fit: Callable[..., tuple[jax.Array, jax.Array | None]]
    search: Callable[..., CodeSearch] | None = None
    weighs_outputs: bool = False


def coder_of(rule: CompressionRule) -> Coder:
    """Returns the coder of a rule's coding."""
    return _CODERS[rule.coding.name]


def search_of(rule: CompressionRule, **weights: Any) -> CodeSearch:
    """Returns the search of a rule's coding for the codes of one channel; `weights` as its `Coder` takes them.

    Raises:
      InputError: the coding has none.
    """
    search = coder_of(rule).search
    if search is None:
        raise InputError(f"the coding {rule.coding.name!r} has no error feedback; set error_feedback = false")
    return search(rule, **weights)


def register(name: str, coder: Coder) -> None:
    """Enters the coder of a coding by the coding's name."""
    _CODERS[name] = coder


@partial(jax.jit, static_argnames=("g", "axis"))
def to_vectors(weight: jax.Array, *, g: int, axis: Axis) -> jax.Array:
    """Returns the vectors [m, g] float32 of a kernel [d_in, d_out], zero-padded past the end of the cut axis.

    The order is that of the flattened codes: row-major over [d_in, ceil(d_out/g)] for axis "out", over
    [ceil(d_in/g), d_out] for axis "in".
    """
    d_in, d_out = weight.shape
    weight = weight.astype(jnp.float32)
    if axis == "out":
        return jnp.pad(weight, ((0, 0), (0, -d_out % g))).reshape(-1, g)
    padded = jnp.pad(weight, ((0, -d_in % g), (0, 0)))
    return padded.reshape(-1, g, d_out).swapaxes(1, 2).reshape(-1, g)


@partial(jax.jit, static_argnames=("g", "axis"))
def to_lines(weight: jax.Array, *, g: int, axis: Axis) -> jax.Array:
    """Returns the lines [r, c, g] float32 of a kernel [d_in, d_out] along its cut axis, zero-padded past its end."""
    lines = (weight if axis == "out" else weight.T).astype(jnp.float32)
    return jnp.pad(lines, ((0, 0), (0, -lines.shape[1] % g))).reshape(len(lines), -1, g)


@partial(jax.jit, static_argnames=("d_out", "g"))
def vector_weights(channel_weights: jax.Array, *, d_out: int, g: int) -> jax.Array:
    """Returns float32 [m], the weight of every vector of axis "out", of its channel's weight [d_in] >= 0.

    Scaled as `channel_mass` has it.
    """
    return jnp.repeat(channel_mass(channel_weights), -(-d_out // g))


def channel_mass(weights: jax.Array) -> jax.Array:
    """Returns float32 [d_in], weights of mean 1, all 1 where all channels are dead (weight 0).

    A dead channel among others gets a millionth, so that its vectors keep codes.

    Args:
      weights: [d_in] >= 0.
    """
    weights = weights.astype(jnp.float32)
    mean = jnp.mean(weights)
    return jnp.where(mean > 0, jnp.maximum(weights / jnp.where(mean > 0, mean, 1.0), 1e-6), jnp.ones_like(weights))


def _fit_plain(
    weight: Any, rule: CompressionRule, channel_weights: Any, *, key: jax.Array, iterations: int, codes: bool
) -> tuple[jax.Array, jax.Array]:
    d_in, d_out = weight.shape
    # No name here refers to the vectors and their weights, so that k-means can free them.
    codebook, index, _ = kmeans.fit_codebook(
        to_vectors(jax.device_put(weight), g=rule.group_size, axis=rule.axis),
        num_codes=rule.num_codes,
        key=key,
        weights=None
        if channel_weights is None
        else vector_weights(jnp.asarray(channel_weights), d_out=d_out, g=rule.group_size),
        iterations=iterations,
    )
    form = rule.form((d_in, d_out))
    return codebook, index.reshape(form.along(form.vectors))


def _fit_trellis(
    weight: Any,
    rule: CompressionRule,
    channel_weights: Any,
    *,
    key: jax.Array,
    iterations: int,
    codes: bool,
    output_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    lines = to_lines(jax.device_put(weight), g=rule.group_size, axis=rule.axis)
    mass = None if channel_weights is None else channel_mass(jnp.asarray(channel_weights))
    trellis = trellis_of(rule)
    places = None if output_weights is None else to_places(output_weights, g=rule.group_size)
    codebook = fit_codebook(lines, trellis, key=key, weights=mass, place_weights=places, rounds=iterations)
    if not codes:
        return codebook, None
    found = best_codes(lines, codebook, places, trellis=trellis)
    return codebook, found if rule.axis == "out" else found.T


@partial(jax.jit, static_argnames="g")
def to_places(output_weights: jax.Array, *, g: int) -> jax.Array:
    """Returns the weights float32 [c, g] of the places in a channel, of those of its outputs [d_out]; padding has 0."""
    return jnp.pad(output_weights.astype(jnp.float32), (0, -len(output_weights) % g)).reshape(-1, g)


def trellis_of(rule: CompressionRule) -> Trellis:
    """Returns L and b of a rule with step_bits."""
    assert rule.step_bits is not None
    return Trellis(window_bits(rule.num_codes), rule.step_bits)


_CODERS = {
    "plain": Coder(_fit_plain, lambda rule: NearestCodes()),
    "trellis": Coder(_fit_trellis, lambda rule, **weights: NearestPath(trellis_of(rule), **weights), True),
}
