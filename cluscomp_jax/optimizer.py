"""AdamW under a schedule with warm-up and clipping, as tuning and finetuning both use it. Knows no parameters."""

from typing import Protocol

import optax

from cluscomp_jax.settings import Schedule


class OptimizerSettings(Protocol):
    """What the optimiser reads of a stage's settings; `TuningSettings` says what each means."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102
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
    return schedule


def make_optimizer(settings: OptimizerSettings, total_steps: int) -> optax.GradientTransformation:
    """Returns AdamW under the settings' schedule, warm-up and clipping."""
    adamw = optax.adamw(make_schedule(settings, total_steps), weight_decay=settings.weight_decay)
    return adamw if settings.clip_norm is None else optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
