"""Training a whole model by next-token loss: what trains, the loss, one optimiser step."""

from cluscomp_jax.training.partition import Layout, merge_params, round_masters, split_params
from cluscomp_jax.training.sharding import Sharding, make_sharding
from cluscomp_jax.training.step import StepMetrics, TrainState, evaluate_step, init_state, summed_loss, train_step

__all__ = [
    "Layout",
    "Sharding",
    "StepMetrics",
    "TrainState",
    "evaluate_step",
    "init_state",
    "make_sharding",
    "merge_params",
    "round_masters",
    "split_params",
    "summed_loss",
    "train_step",
]
