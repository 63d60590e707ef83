"""What Ministral 3 adds to the fields of a GGUF header, where its architecture is called mistral3."""

from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.gguf_header import GgufHeader


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns the rotary embedding and the growth of queries.

    Raises:
      InputError: a YaRN whose attention factor is not 1, or no attention.temperature_scale.
    """
    common = header.fields
    given = dict(common.get("rope_scaling") or {"rope_type": "default"})
    if given["rope_type"] == "yarn":
        multiplier = header.number("rope.scaling.yarn_log_multiplier", 0.0)
        if multiplier != 1:
            raise InputError(
                f"{header.architecture}.rope.scaling.yarn_log_multiplier in the GGUF header is {multiplier}; only 1 is "
                "supported, use the Hugging Face folder"
            )
        given |= {
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": header.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": header.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    original = int(header.number("rope.scaling.original_context_length", common["max_position_embeddings"]))
    given |= {
        "rope_theta": common["rope_theta"],
        "original_max_position_embeddings": original,
        "llama_4_scaling_beta": header.number("attention.temperature_scale"),
    }
    return {
        "rope_parameters": given,
        "rope_scaling": None,
        "sliding_window": header.number("attention.sliding_window", 0) or None,
    }
