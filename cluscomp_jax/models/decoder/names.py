"""The names of a decoder's tensors in Hugging Face folders, where they are our paths with "." for "/".

A family whose names differ has a table of its own.
"""

import re
from collections.abc import Mapping

from cluscomp_jax.models.decoder.model import BLOCKS_PATH
from cluscomp_jax.models.tensor_names import TensorNames

NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "self_attn/q_norm", "self_attn/k_norm",
)  # fmt: skip
KERNELS = (*(f"self_attn/{name}_proj" for name in "qkvo"), *(f"mlp/{name}_proj" for name in ("gate", "up", "down")))
_IGNORABLE = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"


def hugging_face_names(
    *, renamed: Mapping[str, str] | None = None, fused: Mapping[str, tuple[str, ...]] | None = None
) -> TensorNames:
    """Returns the names of a family's tensors.

    Args:
      renamed: {our module inside a block: stored module} where it is not ours.
      fused: {stored module inside a block: our modules whose outputs it has one after another}.
    """
    block = {path: (path.replace("/", "."), "weight") for path in NORMS}
    block |= {path: (path.replace("/", "."), "kernel") for path in KERNELS}
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


HUGGING_FACE = hugging_face_names()
"""The names of most families."""
