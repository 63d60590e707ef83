"""A small random Llama, tokens of it, and a sink that a run can be interrupted at."""

from typing import Any

import numpy as np

from cluscomp_jax import llama
from cluscomp_jax.models.source import DictSink

CONFIG = llama.LlamaConfig(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 60, (4, 12))


class FoldersSink(DictSink):
    """A sink that hands blocks back, and can fail at one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at

    def store_block(self, i: int, tree: Any) -> None:
        if i == self.fail_at:
            raise KeyboardInterrupt
        super().store_block(i, tree)
