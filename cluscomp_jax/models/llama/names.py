"""The names of the llama families' tensors in Hugging Face folders and in GGUF files."""

import re

from cluscomp_jax.models.tensor_names import TensorNames

_OUTER = (
    # Flax module, Hugging Face module, GGUF module, Flax name of its stored "weight"
    ("model/embed_tokens", "model.embed_tokens", "token_embd", "embedding"),
    ("model/norm", "model.norm", "output_norm", "weight"),
    ("lm_head", "lm_head", "output", "kernel"),
)
_BLOCK = (
    ("input_layernorm", "input_layernorm", "attn_norm", "weight"),
    ("self_attn/q_proj", "self_attn.q_proj", "attn_q", "kernel"),
    ("self_attn/k_proj", "self_attn.k_proj", "attn_k", "kernel"),
    ("self_attn/v_proj", "self_attn.v_proj", "attn_v", "kernel"),
    ("self_attn/o_proj", "self_attn.o_proj", "attn_output", "kernel"),
    ("self_attn/q_norm", "self_attn.q_norm", "attn_q_norm", "weight"),
    ("self_attn/k_norm", "self_attn.k_norm", "attn_k_norm", "weight"),
    ("post_attention_layernorm", "post_attention_layernorm", "ffn_norm", "weight"),
    ("mlp/gate_proj", "mlp.gate_proj", "ffn_gate", "kernel"),
    ("mlp/up_proj", "mlp.up_proj", "ffn_up", "kernel"),
    ("mlp/down_proj", "mlp.down_proj", "ffn_down", "kernel"),
)


def _names(column: int, block_prefix: str, ignorable: str, interleaved: tuple[str, ...] = ()) -> TensorNames:
    return TensorNames(
        blocks_path="model/layers",
        block_prefix=block_prefix,
        block={row[0]: (row[column], row[3]) for row in _BLOCK},
        outer={row[0]: (row[column], row[3]) for row in _OUTER},
        head="lm_head/kernel",
        embedding="model/embed_tokens/embedding",
        ignorable=re.compile(ignorable),
        interleaved=interleaved,
    )


_HUGGING_FACE = _names(
    1, "model.layers.", r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"
)
# rope_freqs holds the Llama 3 rope scaling, which is read into the config, not among the parameters.
_GGUF = _names(2, "blk.", r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight", ("llama", "mistral"))

TENSOR_NAMES = {"hugging_face": _HUGGING_FACE, "gguf": _GGUF}
"""{form: names of its tensors}."""
