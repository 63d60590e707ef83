"""Refine rounds after error feedback: coordinate descent over the codes, then least squares for the codebook.

Error feedback chooses a channel's codes from the errors before it alone. Once every channel has codes, all errors are
known. A round lowers the output error tr(E^T H E) of E = W - Q in two steps: over the codes of one channel after
another, all others fixed (coordinate descent, as in QuantEase for scalars: Behdin et al., 2023), and over the codebook,
all codes fixed, which is a linear least-squares problem. Apart from rounding, neither step can raise the error.

H is the damped Hessian E[x x^T] of `cluscomp_jax.clustering.error_feedback`. It is computed again from its root for
each matrix, because a round multiplies by it five times. Letters as there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.clustering.code_search import CodeSearch
from cluscomp_jax.clustering.error_feedback import HessianFactor
from cluscomp_jax.clustering.walk import Rows, walked
from cluscomp_jax.core.second_moments import MATRIX_UNITS, row_blocks, symmetric
from cluscomp_jax.kmeans.assignment import add_by_code
from pallas_kernels.implementation import kernels_or_definition

_ROWS = 128
"""Channels whose changes are added to the others in one product of matrices."""
_STEPS = 3
"""Steps of conjugate gradients: sixteen end within 0.1% of the error of three (docs/experiments.md)."""
_CONVERGED = 1e-12
"""Share of the squared residual at which they end: few codes converge early, and another step would divide 0 by 0."""
_OUTPUTS = 4096
"""Outputs whose errors are in memory at one time while the codebook is solved for."""
_HELD = 1e-3
"""Ridge of the least squares, as a share of a code's own weight: it keeps rarely used codes near their old values."""


class Curvature(NamedTuple):
    """A damped Hessian, its channels in the coding order of a `HessianFactor`.

    Attributes:
      order: int32 [i], the factor's `act_order`.
      hessian: float32 [i, i], rows and columns in that order.
    """

    order: jax.Array
    hessian: jax.Array


@jax.jit
def curvature_of(factor: HessianFactor) -> Curvature:
    """Returns the damped Hessian root root^T of the factor.

    Args:
      factor: act_order int32 [i] and root float32 [i, i].
    """
    return Curvature(factor.act_order, kernels_or_definition(_squared, _squared_in_blocks, factor.root))


def _squared(root: jax.Array) -> jax.Array:
    return jnp.dot(root, root.T, precision="highest")


def _squared_in_blocks(root: jax.Array, *, interpret: bool) -> jax.Array:
    """Returns root root^T in a quarter of the operations: above the diagonal only, without most zeros of the root."""
    del interpret  # no kernel is written here
    return symmetric(
        tuple(
            jnp.dot(root[begin:end, :end], root[begin:, :end].T, precision="highest")
            for begin, end in row_blocks(len(root))
        )
    )


def refine(
    weight: jax.Array,
    codebook: jax.Array,
    index: jax.Array,
    factor: HessianFactor,
    search: CodeSearch,
    *,
    rounds: int,
    key: jax.Array,
    solve: bool = True,
    output_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (codebook float32 [n, g], index int32 [i, c]) after `rounds` refine rounds.

    Args:
      weight: W [i, o], floating; computed in float32.
      codebook: [n, g], floating; computed in float32.
      index: integer [i, c], the codes so far.
      factor: act_order int32 [i] and root float32 [i, i] of the Hessian of the inputs.
      search: for the codes of one channel among those of `codebook`.
      rounds: >= 0; the first lowers the output error most.
      key: seed of the search among later codebooks.
      solve: False leaves the codebook unchanged, where other kernels share it.
      output_weights: float32 [o] >= 0, of the errors of the outputs; those that the search has. None: 1.
    """
    codebook = codebook.astype(jnp.float32)
    if rounds == 0:
        return codebook, index
    curvature = curvature_of(factor)
    for turn in range(rounds):
        if turn and solve:
            search = search.for_codebook(codebook, key)
        index = reassign_codes(weight, codebook, index, curvature, search)
        if solve:
            codebook = update_codebook(weight, codebook, index, curvature, output_weights)
    return codebook, index


@jax.jit
def reassign_codes(
    weight: jax.Array, codebook: jax.Array, index: jax.Array, curvature: Curvature, search: CodeSearch
) -> jax.Array:
    """Returns the index int32 [i, c] after one pass of coordinate descent, channels in the order of error feedback.

    A channel takes the codes nearest to Q_i + (H E)_i / H_ii, which minimises the output error over its row alone.

    Args:
      weight: W [i, o], floating; computed in float32.
      codebook: [n, g], floating; computed in float32.
      index: integer [i, c], the codes so far.
      curvature: order int32 [i] and Hessian float32 [i, i].
      search: for the codes of one channel.
    """
    (channels, outputs), g = weight.shape, codebook.shape[1]
    rows = min(_ROWS, channels)
    spare = -channels % rows
    codebook = codebook.astype(jnp.float32)
    real = (jnp.arange(-(-outputs // g) * g) < outputs) & (jnp.arange(channels + spare) < channels)[:, None]
    ordered = jnp.pad(weight.astype(jnp.float32)[curvature.order], ((0, spare), (0, -outputs % g)))
    index = jnp.pad(index[curvature.order].astype(jnp.int32), ((0, spare), (0, 0)))
    padded = jnp.pad(curvature.hessian, ((0, spare), (0, spare)))
    errors = jnp.where(real, ordered - codebook[index].reshape(ordered.shape), 0.0)

    def scan_rows(search: CodeSearch, codebook: jax.Array, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
        block, before, slopes, within, own, used, held = args

        def choose_row(now: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            slope = slopes[i] + jnp.dot(within[i], now - before, precision="highest")
            target = jnp.where(used[i], block[i] - before[i] + slope / own[i], 0.0)
            chosen = search.choose(target, codebook, held[i], outputs=outputs)
            return now.at[i].set(jnp.where(used[i], block[i] - codebook[chosen].reshape(-1), 0.0)), chosen

        now, chosen = jax.lax.scan(choose_row, before, jnp.arange(rows), reverse=True)
        return now, chosen

    def choose_rows(carry: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        errors, index = carry
        hessian = jax.lax.dynamic_slice_in_dim(padded, first, rows)
        slopes = jnp.dot(hessian, errors, precision=MATRIX_UNITS)
        within = jax.lax.dynamic_slice_in_dim(hessian, first, rows, axis=1)
        own = jnp.where(jnp.diagonal(within) > 0, jnp.diagonal(within), 1.0)  # 0 in channels of padding
        before = jax.lax.dynamic_slice_in_dim(errors, first, rows)
        block, used, held = (jax.lax.dynamic_slice_in_dim(a, first, rows) for a in (ordered, real, index))
        arguments = (block, before, slopes, within, own, used, held)
        now, chosen = walked(search, scan_rows, _rows_of, _finish, *arguments, codebook=codebook, outputs=outputs)
        update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return (update(errors, now), update(index, chosen)), None

    firsts = jnp.arange(0, channels + spare, rows)
    (_, index), _ = jax.lax.scan(choose_rows, (errors, index), firsts, reverse=True)
    return index[jnp.argsort(curvature.order)]


def _rows_of(*args: jax.Array) -> Rows:
    """Returns the rows of a block as a walk takes them: its deltas are the changes of the errors."""
    block, before, slopes, within, own, _, held = args
    scale = own[:, None]
    return Rows(block - before + slopes / scale, block - before, within / scale, held)


def _finish(chosen: jax.Array, change: jax.Array, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (errors, codes) of a walked block."""
    before, used = args[1], args[5]
    return jnp.where(used, before + change, 0.0), chosen


@jax.jit
def update_codebook(
    weight: jax.Array,
    codebook: jax.Array,
    index: jax.Array,
    curvature: Curvature,
    output_weights: jax.Array | None = None,
) -> jax.Array:
    """Returns the codebook float32 [n, g] of nearly the least output error for a fixed index.

    Conjugate gradients on the normal equations sum_i H (W - Q) = 0 over the places of each code, preconditioned by a
    code's own weight. A code that the index does not contain is unchanged.

    Args:
      weight: W [i, o], floating; computed in float32.
      codebook: [n, g], floating, the initial value.
      index: integer [i, c].
      curvature: order int32 [i] and Hessian float32 [i, i].
      output_weights: float32 [o] >= 0, of the errors of the outputs; None: 1.
    """
    n, g = codebook.shape
    masses = jnp.ones(weight.shape[1], jnp.float32) if output_weights is None else output_weights
    pieces = _in_pieces(weight, index, curvature.order, masses, g)

    def spread(codebook: jax.Array, piece: _Piece) -> jax.Array:
        return codebook[piece.codes].reshape(len(piece.codes), -1)

    def gathered(slopes: Callable[[_Piece], jax.Array]) -> jax.Array:
        def add(total: jax.Array, piece: _Piece) -> tuple[jax.Array, None]:
            values = slopes(piece) * piece.masses
            return add_by_code(total, values.reshape(*piece.codes.shape, g), piece.codes), None

        total: jax.Array = jax.lax.scan(add, jnp.zeros((n, g), jnp.float32), pieces)[0]
        return total

    def weighed(errors: jax.Array) -> jax.Array:
        return jnp.dot(curvature.hessian, errors, precision=MATRIX_UNITS)

    squares = jnp.diagonal(curvature.hessian)[:, None]
    mass = gathered(lambda piece: jnp.broadcast_to(squares, piece.weight.shape))
    held = _HELD * mass
    inverse = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
    start = codebook.astype(jnp.float32)
    return start + _solved(
        lambda move: gathered(lambda piece: weighed(spread(move, piece))) + held * move,
        gathered(lambda piece: weighed(piece.weight - spread(start, piece))),
        inverse,
    )


def _solved(times: Callable[[jax.Array], jax.Array], right: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns nearly the x of `times(x)` = `right`, by conjugate gradients from 0.

    Args:
      times: multiplies by a symmetric positive definite matrix.
      right: of any shape.
      inverse: the preconditioner, numbers by which the residual is multiplied.
    """

    def inner(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.vdot(one, other, precision="highest")

    def step(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, residual, direction, strength = state
        goes_on = inner(residual, residual) > _CONVERGED * inner(right, right)
        product = times(direction)
        length = jnp.where(goes_on, strength / inner(direction, product), 0.0)
        x, residual = x + length * direction, residual - length * product
        slope = inverse * residual
        now = inner(residual, slope)
        return x, residual, slope + jnp.where(goes_on, now / strength, 0.0) * direction, now

    first = inverse * right
    found: jax.Array = jax.lax.fori_loop(0, _STEPS, step, (jnp.zeros_like(right), right, first, inner(right, first)))[0]
    return found


class _Piece(NamedTuple):
    """Some of the outputs: weights [i, w], codes [i, w/g], and what their errors count, float32 [w], 0 for padding."""

    weight: jax.Array
    codes: jax.Array
    masses: jax.Array


def _in_pieces(weight: jax.Array, index: jax.Array, order: jax.Array, masses: jax.Array, g: int) -> _Piece:
    """Returns all outputs of the channels in this order, in equal pieces stacked on a leading axis."""
    outputs, codes = weight.shape[1], index.shape[1]
    count = -(-outputs // _OUTPUTS)
    width = -(-codes // count)

    def cut(array: jax.Array, size: int) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, count * size - array.shape[1])))
        return padded.reshape(len(array), count, size).swapaxes(0, 1)

    columns = cut(masses[None], width * g)[:, 0]
    return _Piece(cut(weight.astype(jnp.float32)[order], width * g), cut(index[order], width), columns)
