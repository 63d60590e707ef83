"""What Seed-OSS adds to the fields of a GGUF header."""

from typing import Any

from cluscomp_jax.models.gguf_header import GgufHeader


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns whether o has a bias; of q, k and v the common fields say it."""
    return {"attention_out_bias": header.bias("attn_output")}
