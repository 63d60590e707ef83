"""The loss after the last block: next tokens and a teacher's distributions, a few positions at a time.

The gradient is taken on the way forward, while the logits of a chunk are there, so none are computed twice. Knows no
blocks and no optimiser.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.config.training import DistillationConfig
from cluscomp_jax.core.losses import divergence, token_nll
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.sharding import Sharding, gathered
from cluscomp_jax.training.partition import join_group


class TeacherHead(NamedTuple):
    """What a teacher's logits come from: its parameters outside the blocks, and its x [b, t, d] after the blocks."""

    outer: Params
    x: jax.Array


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """What is static in the loss.

    Attributes:
      model: the student.
      at_once: about how many positions have logits at one time; one of each row at least.
      sharding: the shardings of the arrays on several devices; None: on one.
      teacher: the teacher's model, None without one.
      distillation: with a teacher, how the two losses are mixed.
    """

    model: Model
    at_once: int
    sharding: Sharding | None = None
    teacher: Model | None = None
    distillation: DistillationConfig | None = None

    def __call__(
        self,
        trained: Params,
        frozen: Params,
        x: jax.Array,
        targets: jax.Array,
        loss_mask: jax.Array,
        teacher: TeacherHead | None = None,
    ) -> jax.Array:
        """Returns the loss summed over the scored positions, float32.

        Args:
          trained, frozen: the group "rest" of either tree; the loss is differentiable in `trained`.
          x: [b, t, d] after the last block, of the compute dtype; the loss is differentiable in it.
          targets: int32 [b, t], the token after each position.
          loss_mask: bool [b, t].
          teacher: of the same tokens.
        """
        # Cast once: inside the loop it would be done for every chunk.
        fixed = (_cast(frozen, x.dtype), None if teacher is None else _cast(teacher.outer, x.dtype))
        rows = (targets, loss_mask, None if teacher is None else teacher.x)
        total: jax.Array = _summed(self, trained, x, fixed, rows)
        return total


def _cast(tree: Params, dtype: Any) -> Params:
    def one(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    cast: Params = jax.tree.map(one, tree)
    return cast


def _chunk_loss(loss: HeadLoss, trained: Params, x: jax.Array, fixed: Any, rows: Any) -> jax.Array:
    frozen, teacher_rest = fixed
    targets, loss_mask, teacher_x = rows
    logits = loss.model.head(gathered(join_group(trained, frozen), loss.sharding), x)
    losses = token_nll(logits, targets)
    if loss.teacher is not None and loss.distillation is not None:
        share, temperature = loss.distillation.weight, loss.distillation.temperature
        apart = divergence(loss.teacher.head(teacher_rest, teacher_x), logits, temperature)
        losses = (1 - share) * losses + share * temperature**2 * apart
    return jnp.sum(jnp.where(loss_mask, losses, 0.0))


def _chunks(loss: HeadLoss, tree: Any) -> Any:
    """Returns every [b, t, ...] as [chunks, b, size, ...]; the end is padded with zeros, which are not scored."""
    rows, length = jax.tree.leaves(tree)[0].shape[:2]
    size = min(max(1, loss.at_once // rows), length)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, -length % size), *((0, 0) for _ in array.shape[2:])))
        return jnp.moveaxis(padded.reshape(rows, -1, size, *array.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loss: HeadLoss, trained: Params, x: jax.Array, fixed: Any, rows: Any) -> jax.Array:
    def add(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        return total + _chunk_loss(loss, trained, chunk[0], fixed, chunk[1]), None

    total: jax.Array = jax.lax.scan(add, jnp.float32(0), _chunks(loss, (x, rows)))[0]
    return total


def _forward(
    loss: HeadLoss, trained: Params, x: jax.Array, fixed: Any, rows: Any
) -> tuple[jax.Array, tuple[Params, jax.Array]]:
    both = jax.value_and_grad(partial(_chunk_loss, loss), argnums=(0, 1))

    def add(totals: tuple[jax.Array, Params], chunk: Any) -> tuple[Any, jax.Array]:
        value, (d_trained, d_x) = both(trained, chunk[0], fixed, chunk[1])
        return jax.tree.map(jnp.add, totals, (value, d_trained)), d_x

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
    (total, d_trained), d_x = jax.lax.scan(add, nothing, _chunks(loss, (x, rows)))
    joined = jnp.moveaxis(d_x, 0, 1).reshape(x.shape[0], -1, x.shape[2])
    return total, (d_trained, joined[:, : x.shape[1]])


def _backward(loss: HeadLoss, saved: tuple[Params, jax.Array], scale: jax.Array) -> tuple[Any, ...]:
    d_trained, d_x = jax.tree.map(lambda leaf: (scale * leaf.astype(scale.dtype)).astype(leaf.dtype), saved)
    return d_trained, d_x, None, None


_summed.defvjp(_forward, _backward)
