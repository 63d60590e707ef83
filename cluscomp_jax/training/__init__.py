"""Training a whole model by next-token loss: what trains, the loss, one optimiser step."""

from cluscomp_jax.models.sharding import AXES, Sharding, make_sharding, sharding_on
from cluscomp_jax.training.partition import (
    Layout,
    Teacher,
    changed_dtypes,
    load_teacher,
    merge_params,
    refuse_unmatched,
    round_masters,
    split_params,
    split_shapes,
)
from cluscomp_jax.training.step import (
    StepMetrics,
    TrainState,
    evaluate_step,
    init_state,
    state_places,
    summed_loss,
    train_step,
)

__all__ = [
    "AXES",
    "Layout",
    "Sharding",
    "StepMetrics",
    "Teacher",
    "TrainState",
    "changed_dtypes",
    "evaluate_step",
    "init_state",
    "load_teacher",
    "make_sharding",
    "merge_params",
    "refuse_unmatched",
    "round_masters",
    "sharding_on",
    "split_params",
    "split_shapes",
    "state_places",
    "summed_loss",
    "train_step",
]
