"""What Gemma 2 and 3 add to the fields of a GGUF header."""

from typing import Any

from cluscomp_jax.models.gguf_header import GgufHeader

_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose queries are divided by sqrt(hidden_size / heads); GGUF files do not have the scale,
and llama.cpp too knows these models by their number of layers."""


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns windows, softcaps, the scale of queries and, of Gemma 3, both rotary bases."""
    common = header.fields
    largest = common["num_hidden_layers"] == _LARGEST[header.architecture]
    fields: dict[str, Any] = {
        "query_pre_attn_scalar": (
            common["hidden_size"] // common["num_attention_heads"] if largest else common["head_dim"]
        ),
        "sliding_window": header.number("attention.sliding_window", 4096),
    }
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if header.has(key):
            fields[name] = header.number(key)
    if header.architecture == "gemma3":
        fields["rope_theta"] = header.number("rope.freq_base", 1e6)
        fields["rope_local_base_freq"] = header.number("rope.freq_base_swa", 1e4)
    return fields
