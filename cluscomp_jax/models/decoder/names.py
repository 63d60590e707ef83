"""The names of a decoder's tensors: in Hugging Face folders our paths with "." for "/", in GGUF files llama.cpp's.

A family says which of its names differ.
"""

import re
from collections.abc import Mapping

from cluscomp_jax.models.decoder.config import Norms
from cluscomp_jax.models.decoder.parameters import BLOCKS_PATH
from cluscomp_jax.models.tensor_names import TensorNames

NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "self_attn/q_norm", "self_attn/k_norm",
)  # fmt: skip
_MLP = ("gate", "up", "down")
KERNELS = (*(f"self_attn/{name}_proj" for name in "qkvo"), *(f"mlp/{name}_proj" for name in _MLP))
_IGNORABLE = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"


def hugging_face_names(
    *,
    renamed: Mapping[str, str] | None = None,
    fused: Mapping[str, tuple[str, ...]] | None = None,
    experts: tuple[str, tuple[str, str, str]] | None = None,
) -> TensorNames:
    """Returns the names of a family's tensors.

    Args:
      renamed: {our module inside a block: stored module} where it is not ours.
      fused: {stored module inside a block: our modules whose outputs it has one after another}.
      experts: of a mixture: (stored module of router and experts, stored names of gate, up and down of an expert).
    """
    block = {path: (path.replace("/", "."), "weight") for path in NORMS}
    block |= {path: (path.replace("/", "."), "kernel") for path in KERNELS}
    if experts is not None:
        place, stored_names = experts
        block["mlp/router"] = (f"{place}.gate", "kernel")
        for name, stored in zip(_MLP, stored_names, strict=True):
            block[f"mlp/experts/*/{name}_proj"] = (f"{place}.experts.*.{stored}", "kernel")
    block |= {path: (stored, block[path][1]) for path, stored in (renamed or {}).items()}
    return TensorNames(
        blocks_path=BLOCKS_PATH,
        block_prefix="model.layers.",
        block=block,
        outer={
            "model/embed_tokens": ("model.embed_tokens", "embedding"),
            "model/norm": ("model.norm", "weight"),
            "lm_head": ("lm_head", "kernel"),
        },
        head="lm_head/kernel",
        embedding="model/embed_tokens/embedding",
        ignorable=re.compile(_IGNORABLE),
        fused=fused or {},
    )


_GGUF_KERNELS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_GGUF_NORMS = {
    "pre": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "post": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    "sandwich": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def gguf_names(
    norms: Norms = "pre",
    *,
    renamed: Mapping[str, str] | None = None,
    fused: Mapping[str, tuple[str, ...]] | None = None,
    interleaved: tuple[str, ...] = (),
    experts: bool = False,
    config_tensors: tuple[str, ...] = (),
) -> TensorNames:
    """Returns the names of a family's tensors in GGUF files.

    Args:
      norms: where its norms are.
      renamed, fused: as for `hugging_face_names`.
      interleaved: see `TensorNames`.
      experts: whether it is a mixture; the reader of files gives each expert's matrix a name of its own.
      config_tensors: stored names of what the family reads into its config, and not among the parameters.
    """
    ignorable = (r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd\.weight", *map(re.escape, config_tensors))
    block = {path: (stored, "kernel") for path, stored in zip(KERNELS, _GGUF_KERNELS, strict=True)}
    block |= {f"self_attn/{name}_norm": (f"attn_{name}_norm", "weight") for name in "qk"}
    block |= {path: (stored, "weight") for path, stored in _GGUF_NORMS[norms].items()}
    if experts:
        block |= {f"mlp/experts/*/{name}_proj": (f"ffn_{name}_exps.*", "kernel") for name in _MLP}
        block["mlp/router"] = ("ffn_gate_inp", "kernel")
    block |= {path: (stored, block[path][1]) for path, stored in (renamed or {}).items()}
    return TensorNames(
        blocks_path=BLOCKS_PATH,
        block_prefix="blk.",
        block=block,
        outer={
            "model/embed_tokens": ("token_embd", "embedding"),
            "model/norm": ("output_norm", "weight"),
            "lm_head": ("output", "kernel"),
        },
        head="lm_head/kernel",
        embedding="model/embed_tokens/embedding",
        ignorable=re.compile("|".join(ignorable)),  # rope_freqs has the scaling of Llama 3's rope, read into the config
        fused=fused or {},
        interleaved=interleaved,
    )


HUGGING_FACE = hugging_face_names()
"""The names of most families."""
