"""Block-wise tuning of codebooks, and the activation streams it reads."""

from cluscomp_jax.models.activations import ActivationStore, run_through
from cluscomp_jax.tuning.blockwise import BlockTuning, split_trainable, tune_block

__all__ = ["ActivationStore", "BlockTuning", "run_through", "split_trainable", "tune_block"]
