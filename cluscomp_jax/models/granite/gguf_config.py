"""What Granite adds to the fields of a GGUF header."""

from typing import Any

from cluscomp_jax.models.gguf_header import GgufHeader


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns the multipliers; one that the header has not is the neutral one."""
    plain = header.fields["head_dim"] ** -0.5
    return {
        "embedding_multiplier": header.number("embedding_scale", 1.0),
        "residual_multiplier": header.number("residual_scale", 1.0),
        "logits_scaling": header.number("logit_scale", 1.0),
        "attention_multiplier": header.number("attention.scale", plain),
    }
