"""The config.json of OPT (arXiv 2205.01068) and of Galactica <-> DecoderConfig. Knows no files."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.models.decoder import hf_fields
from cluscomp_jax.models.decoder.config import DecoderConfig, LayerKind
from cluscomp_jax.models.layers import config_fields

_OFFSET = 2
"""Rows of the table of positions that come before that of the first token, in every OPT."""
_EPS = 1e-5
"""Of all norms; config.json has no field of it."""


def parse_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a config.json mapping; absent fields take the defaults of transformers.

    Raises:
      InputError: a size is missing or out of range, or a field asks for a computation this family does not do.
    """
    hf_fields.refuse_all_but(fields, ())
    own = {name: value for name, value in fields.items() if name not in _OTHER_NAMES}
    own |= {
        "intermediate_size": config_fields.integer(fields, "ffn_dim"),
        "initializer_range": config_fields.number(fields, "init_std", 0.02),
    }
    sizes = hf_fields.read_sizes(own, eps=_EPS, tied=True, activation="activation_function", activation_default="relu")
    before = config_fields.flag(fields, "do_layer_norm_before", True)
    embedded = config_fields.integer(fields, "word_embed_proj_dim", sizes["hidden_size"])
    bias = config_fields.flag(fields, "enable_bias", True)
    return DecoderConfig(
        **sizes,
        layers=(LayerKind(),) * sizes["num_hidden_layers"],
        norms="pre" if before else "after_sum",
        norm="layer" if config_fields.flag(fields, "layer_norm_elementwise_affine", True) else "bare_layer",
        final_norm=before and not config_fields.flag(fields, "_remove_final_layer_norm"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        position_offset=_OFFSET,
        embedding_size=None if embedded == sizes["hidden_size"] else embedded,
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """Returns a JSON-ready config.json mapping. Invariant: parse_config(to_hf_dict(config)) == config."""
    fields = hf_fields.write_sizes(config, "OPTForCausalLM", activation="activation_function")
    before = config.norms == "pre"
    return {name: value for name, value in fields.items() if name not in _OTHER_NAMES} | {
        "ffn_dim": config.intermediate_size,
        "init_std": config.initializer_range,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "layer_norm_elementwise_affine": config.norm == "layer",
        "word_embed_proj_dim": config.embedding_size or config.hidden_size,
        "enable_bias": config.qkv_bias,
    }


_OTHER_NAMES = (
    "intermediate_size", "initializer_range", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act",
)  # fmt: skip
"""Fields of other families: OPT has its own names for the first two, and does not read the others."""
