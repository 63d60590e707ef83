"""What Qwen3-MoE adds to the fields of a GGUF header."""

from typing import Any

from cluscomp_jax.models.gguf_header import GgufHeader


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns the experts: their numbers and width, and that shares are normalised, as llama.cpp computes them."""
    return {
        "num_experts": header.number("expert_count"),
        "num_experts_per_tok": header.number("expert_used_count"),
        "moe_intermediate_size": header.number("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }
