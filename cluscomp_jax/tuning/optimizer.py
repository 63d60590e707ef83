"""AdamW under a schedule with warm-up and clipping, as tuning and finetuning both use it. Knows no parameters."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from cluscomp_jax.config.numerics import Schedule

_LEAST_RMS = 1e-6
"""The root mean square that an array is taken to have at least; one of zeros hardly moves."""


class OptimizerSettings(Protocol):
    """What the optimiser reads of a stage's settings; `BlockTuningConfig` says what each means."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def relative_rate(self) -> bool: ...  # noqa: D102
    @property
    def schedule(self) -> Schedule: ...  # noqa: D102
    @property
    def warmup_fraction(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def clip_norm(self) -> float | None: ...  # noqa: D102


def make_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps done before."""
    warmup = round(settings.warmup_fraction * total_steps)
    after = max(total_steps - warmup, 1)
    courses = {
        "constant": optax.constant_schedule(settings.learning_rate),
        "cosine": optax.cosine_decay_schedule(settings.learning_rate, after),
        "linear": optax.linear_schedule(settings.learning_rate, 0.0, after),
    }
    schedule = courses[settings.schedule]
    if warmup:
        rise = optax.linear_schedule(settings.learning_rate / warmup, settings.learning_rate, max(warmup - 1, 1))
        schedule = optax.join_schedules([rise, schedule], [warmup])
    return _promoting(schedule)


def make_optimizer(
    settings: OptimizerSettings, total_steps: int, *, stacked: Callable[[str], bool] = lambda path: False
) -> optax.GradientTransformation:
    """Returns AdamW under the settings' schedule, warm-up and clipping.

    Where `settings.relative_rate`, an array moves by the rate times the root mean square that it has at that step: with
    all weights of an array twice as large and their gradients half as large, all steps are twice as large. Weight decay
    is a share of every weight as it is.

    Args:
      stacked: whether the array at a path of the trained tree holds one array of each block along its first axis.
    """
    middle = _decayed_relative(settings.weight_decay, stacked) if settings.relative_rate else None
    adam = optax.scale_by_adam()
    adamw = optax.chain(
        optax.GradientTransformation(adam.init, _promoting(adam.update)),
        middle or optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(make_schedule(settings, total_steps)),
    )
    return adamw if settings.clip_norm is None else optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of Optax with implicit promotion of dtypes, which a caller's JAX may forbid."""

    def call(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return call


def _decayed_relative(weight_decay: float, stacked: Callable[[str], bool]) -> optax.GradientTransformation:
    """Returns the step of a chain that makes updates relative to their arrays, then adds the decay; without a state."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def relative(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return update * rms(param, stacked=stacked(name)) + weight_decay * param

        return jax.tree_util.tree_map_with_path(relative, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def rms(array: jax.Array, *, stacked: bool = False) -> jax.Array:
    """Returns the root mean square of an array, float32, at least `_LEAST_RMS`; of each along the first axis if
    stacked.

    All axes are kept, with length 1.
    """
    axes = tuple(range(1 if stacked else 0, array.ndim))
    mean = jnp.mean(jnp.square(array.astype(jnp.float32)), axis=axes, keepdims=True)
    return jnp.maximum(jnp.sqrt(mean), _LEAST_RMS)
