"""Training a whole model by next-token loss: what trains, the loss, one optimiser step."""

from cluscomp_jax.training.partition import (
    Layout,
    Teacher,
    load_teacher,
    merge_params,
    round_masters,
    split_params,
    split_shapes,
)
from cluscomp_jax.training.step import StepMetrics, TrainState, evaluate_step, init_state, summed_loss, train_step

__all__ = [
    "Layout",
    "StepMetrics",
    "Teacher",
    "TrainState",
    "evaluate_step",
    "init_state",
    "load_teacher",
    "merge_params",
    "round_masters",
    "split_params",
    "split_shapes",
    "summed_loss",
    "train_step",
]
