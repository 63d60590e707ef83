"""What Mixtral adds to the fields of a GGUF header."""

from typing import Any

from cluscomp_jax.models.gguf_header import GgufHeader


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns the numbers of experts, and the window."""
    return {
        "num_local_experts": header.number("expert_count"),
        "num_experts_per_tok": header.number("expert_used_count"),
        "sliding_window": header.number("attention.sliding_window", 0) or None,
    }
