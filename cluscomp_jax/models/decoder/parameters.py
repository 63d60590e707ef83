"""The parameters of a decoder by path: where its norms are, which kernels read one input, the shapes.

Letters: d hidden_size, h head_dim, q query heads, k key-value heads.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from cluscomp_jax.models.decoder.config import DecoderConfig

Shapes = dict[str, tuple[int, ...]]
BLOCKS_PATH = "model/layers"
_ATTENTION_GROUPS = {
    "self_attn/input": tuple(f"self_attn/{name}_proj/kernel" for name in "qkv"),
    "self_attn/output": ("self_attn/o_proj/kernel",),
}


def _mlp_groups(path: str) -> dict[str, tuple[str, ...]]:
    """Returns the input groups of the MLP at a block-relative path."""
    return {
        f"{path}/input": (f"{path}/gate_proj/kernel", f"{path}/up_proj/kernel"),
        f"{path}/hidden": (f"{path}/down_proj/kernel",),
    }


INPUT_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(_ATTENTION_GROUPS | _mlp_groups("mlp"))
"""The input groups of a block without experts."""
UNGATED: Mapping[str, tuple[str, ...]] = MappingProxyType(dict(INPUT_GROUPS) | {"mlp/input": ("mlp/up_proj/kernel",)})
"""The same where the MLP has no gate."""


def groups_with_experts(paths: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Returns the input groups of a block with experts at these block-relative paths."""
    inputs, hidden = zip(*(_mlp_groups(path).items() for path in paths), strict=True)
    return MappingProxyType(_ATTENTION_GROUPS | dict(inputs) | dict(hidden))


class NormNames(NamedTuple):
    """The norms of a block by where they are; None: there is none."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None
    after_attention_sum: str | None = None
    after_mlp_sum: str | None = None


NORMS = {
    "pre": NormNames(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    "post": NormNames(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    "sandwich": NormNames(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
    # Under the names of "pre": OPT's files, too, have the same names for both.
    "after_sum": NormNames(after_attention_sum="input_layernorm", after_mlp_sum="post_attention_layernorm"),
}
"""{`DecoderConfig.norms`: the names}."""


def block_shapes(c: DecoderConfig, mlp_paths: Sequence[str]) -> Shapes:
    """Returns {block-relative path: shape} of a block's dense parameters.

    Args:
      c: the record of switches.
      mlp_paths: block-relative paths of the MLP, or of all experts.
    """
    norms = NORMS[c.norms]
    shapes = _norm(c, norms.before_attention or norms.after_attention_sum) | _attention(c)
    shapes |= _norm(c, norms.after_attention) | _norm(c, norms.before_mlp or norms.after_mlp_sum)
    if c.experts is not None:
        shapes["mlp/router/kernel"] = (c.hidden_size, c.experts.count)
    for path in mlp_paths:
        shapes |= _mlp(c, path)
    return shapes | _norm(c, norms.after_mlp)


def outer_shapes(c: DecoderConfig) -> Shapes:
    """Returns {path: shape} of the parameters outside the blocks."""
    wide, own = c.hidden_size, c.embedding_size or c.hidden_size
    shapes: Shapes = {"model/embed_tokens/embedding": (c.vocab_size, own)}
    if c.position_offset is not None:
        shapes["model/embed_positions/embedding"] = (c.position_offset + c.max_position_embeddings, wide)
    if c.embedding_size is not None:
        shapes |= {"model/project_in/kernel": (own, wide), "model/project_out/kernel": (wide, own)}
    shapes |= _norm(c, "model/norm" if c.final_norm else None)
    if not c.tie_word_embeddings:
        shapes["lm_head/kernel"] = (own, c.vocab_size)
    return shapes


def _attention(c: DecoderConfig) -> Shapes:
    d, queries, pairs = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: Shapes = {}
    for name, sides in {"q": (d, queries), "k": (d, pairs), "v": (d, pairs), "o": (queries, d)}.items():
        shapes |= _projection(f"self_attn/{name}_proj", sides, bias=c.o_bias if name == "o" else c.qkv_bias)
    if c.qk_norm != "none":
        widths = {"q": queries, "k": pairs} if c.qk_norm == "projection" else dict.fromkeys("qk", c.head_dim)
        shapes |= {f"self_attn/{name}_norm/weight": (width,) for name, width in widths.items()}
    return shapes


def _mlp(c: DecoderConfig, path: str) -> Shapes:
    d, inner = c.hidden_size, c.intermediate_size
    shapes = _projection(f"{path}/gate_proj", (d, inner), bias=c.mlp_bias) if c.gated_mlp else {}
    shapes |= _projection(f"{path}/up_proj", (d, inner), bias=c.mlp_bias)
    return shapes | _projection(f"{path}/down_proj", (inner, d), bias=c.mlp_bias)


def _projection(path: str, sides: tuple[int, int], *, bias: bool) -> Shapes:
    return {f"{path}/kernel": sides} | ({f"{path}/bias": sides[1:]} if bias else {})


def _norm(c: DecoderConfig, name: str | None) -> Shapes:
    leaves = {"rms": ("weight",), "layer": ("weight", "bias"), "bare_layer": ()}[c.norm]
    return {} if name is None else {f"{name}/{leaf}": (c.hidden_size,) for leaf in leaves}
