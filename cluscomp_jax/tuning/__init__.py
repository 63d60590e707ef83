"""Block-wise tuning of codebooks, and the activation streams it reads."""

from cluscomp_jax.tuning.blockwise import BlockTuning, split_trainable, tune_block
from cluscomp_jax.tuning.store import ActivationStore, run_through

__all__ = ["ActivationStore", "BlockTuning", "run_through", "split_trainable", "tune_block"]
