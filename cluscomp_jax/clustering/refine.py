"""Codes and codebook made better together, once every channel has codes: descent on the output error.

Error feedback chooses a channel's codes knowing only the errors before it. Afterwards all are known, and the output
error tr(E^T H E) of E = W - Q can be lowered by turns: over the codes of one channel, all others held (coordinate
descent, as QuantEase has it for scalars: Behdin et al., 2023), and over the codebook, all codes held, which is a
linear least-squares problem. Neither can raise the error but by rounding.

H is the damped E[x x^T] of `cluscomp_jax.clustering.error_feedback`, made again from its root for each matrix: the
rounds multiply by it five times each. Letters as there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.clustering.error_feedback import HessianFactor, nearest_to_row
from cluscomp_jax.kmeans import CodeIndex, build_code_index

_ROWS = 128
"""Channels whose changes reach the others together."""
_STEPS = 3
"""Of conjugate gradients: sixteen end within 0.1% of the error of three (docs/experiments.md)."""
_OUTPUTS = 4096
"""Whose errors the codebook's equations hold at one time."""
_HELD = 1e-3
"""Share of its own weight by which a code is held where it is, so that codes hardly used cannot run away."""


class Curvature(NamedTuple):
    """H float32 [i, i], its channels in the order int32 [i] of a `Feedback`."""

    order: jax.Array
    hessian: jax.Array


@jax.jit
def curvature_of(factor: HessianFactor) -> Curvature:
    """Returns the damped second moments of which the feedback has the root."""
    return Curvature(factor.act_order, jnp.dot(factor.root, factor.root.T, precision="highest"))


def refine(
    weight: jax.Array,
    codebook: jax.Array,
    index: jax.Array,
    factor: HessianFactor,
    *,
    rounds: int,
    code_index: CodeIndex | None,
    key: jax.Array,
    solve: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Returns (codebook float32 [n, g], index int32 [i, c]) after so many rounds of new codes and a new codebook.

    Args:
      weight: [i, o].
      codebook: [n, g].
      index: [i, c], the codes so far.
      feedback: order and root of the moments.
      rounds: >= 0; the first lowers the output error most.
      forest: of the codes as they are given.
      key: decides the trees of the codes that follow (`build_code_index`).
      solve: False leaves the codebook as it is, for other kernels have it too.
    """
    codebook = codebook.astype(jnp.float32)
    if rounds == 0:
        return codebook, index
    curvature = curvature_of(factor)
    for turn in range(rounds):
        if turn and solve:
            code_index = build_code_index(codebook, key)
        index = reassign_codes(weight, codebook, index, curvature, g=codebook.shape[1], code_index=code_index)
        if solve:
            codebook = update_codebook(weight, codebook, index, curvature)
    return codebook, index


@partial(jax.jit, static_argnames="g")
def reassign_codes(
    weight: jax.Array,
    codebook: jax.Array,
    index: jax.Array,
    curvature: Curvature,
    *,
    g: int,
    code_index: CodeIndex | None = None,
) -> jax.Array:
    """Returns the index int32 [i, c] after one round in which every channel chooses anew, those of large moment first.

    A channel takes the codes nearest to Q_i + (H E)_i / H_ii, the least of the output error over its row alone.

    Args:
      weight: [i, o].
      codebook: [n, g]; computed in float32.
      index: [i, c], the codes so far.
      curvature: order and moments.
      forest: of the codes; None: every vector is compared with all of them.
    """
    channels, outputs = weight.shape
    rows = min(_ROWS, channels)
    spare = -channels % rows
    codebook = codebook.astype(jnp.float32)
    real = (jnp.arange(-(-outputs // g) * g) < outputs) & (jnp.arange(channels + spare) < channels)[:, None]
    ordered = jnp.pad(weight.astype(jnp.float32)[curvature.order], ((0, spare), (0, -outputs % g)))
    index = jnp.pad(index[curvature.order].astype(jnp.int32), ((0, spare), (0, 0)))
    padded = jnp.pad(curvature.hessian, ((0, spare), (0, spare)))
    errors = jnp.where(real, ordered - codebook[index].reshape(ordered.shape), 0.0)

    def choose_rows(carry: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        errors, index = carry
        hessian = jax.lax.dynamic_slice_in_dim(padded, first, rows)
        slopes = jnp.dot(hessian, errors, precision="highest")
        within = jax.lax.dynamic_slice_in_dim(hessian, first, rows, axis=1)
        own = jnp.where(jnp.diagonal(within) > 0, jnp.diagonal(within), 1.0)  # 0 where channels are spare
        before = jax.lax.dynamic_slice_in_dim(errors, first, rows)
        block, used, held = (jax.lax.dynamic_slice_in_dim(a, first, rows) for a in (ordered, real, index))

        def choose_row(now: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            slope = slopes[i] + jnp.dot(within[i], now - before, precision="highest")
            target = jnp.where(used[i], block[i] - before[i] + slope / own[i], 0.0)
            chosen = nearest_to_row(target, codebook, code_index, held[i], outputs=outputs)
            return now.at[i].set(jnp.where(used[i], block[i] - codebook[chosen].reshape(-1), 0.0)), chosen

        now, chosen = jax.lax.scan(choose_row, before, jnp.arange(rows), reverse=True)
        update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return (update(errors, now), update(index, chosen)), None

    firsts = jnp.arange(0, channels + spare, rows)
    (_, index), _ = jax.lax.scan(choose_rows, (errors, index), firsts, reverse=True)
    return index[jnp.argsort(curvature.order)]


@jax.jit
def update_codebook(weight: jax.Array, codebook: jax.Array, index: jax.Array, curvature: Curvature) -> jax.Array:
    """Returns the codebook float32 [n, g] of nearly the least output error with these codes.

    Conjugate gradients on the normal equations sum_i H (W - Q) = 0 over the places of each code, preconditioned by a
    code's own weight. A code that stands nowhere stays where it is.

    Args:
      weight: [i, o].
      codebook: [n, g], where to begin.
      index: [i, c].
      curvature: order and moments.
    """
    n, g = codebook.shape
    pieces = _in_pieces(weight, index, curvature.order, g)

    def spread(codebook: jax.Array, piece: _Piece) -> jax.Array:
        return jnp.where(piece.real, codebook[piece.codes].reshape(len(piece.codes), -1), 0.0)

    def gathered(slopes: Callable[[_Piece], jax.Array]) -> jax.Array:
        def add(total: jax.Array, piece: _Piece) -> tuple[jax.Array, None]:
            values = jnp.where(piece.real, slopes(piece), 0.0)
            return total.at[piece.codes].add(values.reshape(*piece.codes.shape, g)), None

        total: jax.Array = jax.lax.scan(add, jnp.zeros((n, g), jnp.float32), pieces)[0]
        return total

    def weighed(errors: jax.Array) -> jax.Array:
        return jnp.dot(curvature.hessian, errors, precision="highest")

    squares = jnp.diagonal(curvature.hessian)[:, None]
    mass = gathered(lambda piece: jnp.broadcast_to(squares, piece.weight.shape))
    held = _HELD * mass
    inverse = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
    start = codebook.astype(jnp.float32)
    solved: jax.Array = jax.scipy.sparse.linalg.cg(  # type: ignore[no-untyped-call]
        lambda move: gathered(lambda piece: weighed(spread(move, piece))) + held * move,
        gathered(lambda piece: weighed(piece.weight - spread(start, piece))),
        M=lambda slope: inverse * slope,
        tol=1e-6,  # where so few codes are that it ends early, another step would divide nothing by nothing
        maxiter=_STEPS,
    )[0]
    return start + solved


class _Piece(NamedTuple):
    """Some of the outputs: weights [i, w], codes [i, w/g], and bool [w], which are no padding."""

    weight: jax.Array
    codes: jax.Array
    real: jax.Array


def _in_pieces(weight: jax.Array, index: jax.Array, order: jax.Array, g: int) -> _Piece:
    """Returns all outputs of the channels in this order, in equal pieces stacked on a leading axis."""
    outputs, codes = weight.shape[1], index.shape[1]
    count = -(-outputs // _OUTPUTS)
    width = -(-codes // count)

    def cut(array: jax.Array, size: int) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, count * size - array.shape[1])))
        return padded.reshape(len(array), count, size).swapaxes(0, 1)

    real = jnp.arange(count * width * g) < outputs
    return _Piece(cut(weight.astype(jnp.float32)[order], width * g), cut(index[order], width), real.reshape(count, -1))
