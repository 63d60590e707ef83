"""What Phi-3 and Phi-4 add to the fields of a GGUF header: windows, a part of the head that rotates, LongRoPE."""

from typing import Any

from cluscomp_jax.models.gguf_header import GgufHeader

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""The tensors of LongRoPE's factors."""


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns them; the factors of LongRoPE are two small tensors."""
    head_dim = header.fields["head_dim"]
    rotary = int(header.number("rope.dimension_count", head_dim))
    context = header.fields["max_position_embeddings"]
    fields: dict[str, Any] = {
        "sliding_window": header.number("attention.sliding_window", 0) or None,
        "partial_rotary_factor": 1.0 if rotary == head_dim else (rotary + 0.5) / head_dim,
        "original_max_position_embeddings": int(header.number("rope.scaling.original_context_length", context)),
    }
    if LONG in header.shapes and SHORT in header.shapes:
        scaling: dict[str, Any] = {"type": "longrope"}
        for name, tensor in (("short_factor", SHORT), ("long_factor", LONG)):
            scaling[name] = [float(str(value)) for value in header.read(tensor)]
        if header.has("rope.scaling.attn_factor"):
            scaling["attention_factor"] = header.number("rope.scaling.attn_factor")
        fields["rope_scaling"] = scaling
    return fields
