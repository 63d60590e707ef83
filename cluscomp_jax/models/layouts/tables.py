"""The tables of the codebases whose trees `compress` takes. Their names and shapes were read in their sources.

A pattern has all spellings of one codebase: norms are `scale`, `weight` or `kernel`, by release and module.
"""

from cluscomp_jax.models.layouts.layout import Layout, Row

_KERNEL, _TORCH = "i o -> | i | o", "o i -> | i | o"
_TO_HEADS, _FROM_HEADS = "i n h -> | i | n h", "n h o -> | n h | o"
_NORM = "(weight|scale|kernel)"
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def _hugging_face(weight: str, axes: str, table: str) -> tuple[dict[str, Row], dict[str, Row]]:
    """Returns (outer, block) of the names of Hugging Face, `weight` being that of kernels and `table` of embeddings."""
    outer = {
        "model/embed_tokens/embedding": (f"(model/)?embed_tokens/{table}", "v d"),
        "model/norm/weight": (f"(model/)?norm/{_NORM}", "d"),
        "lm_head/kernel": (f"lm_head/{weight}", axes),
    }
    norms = (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        "self_attn/q_norm", "self_attn/k_norm",
    )  # fmt: skip
    block = {f"{name}/weight": (f"{name}/{_NORM}", "d") for name in norms}
    for name in (*(f"self_attn/{x}_proj" for x in _ATTENTION), *(f"mlp/{x}_proj" for x in _MLP)):
        block |= {f"{name}/kernel": (f"{name}/{weight}", axes), f"{name}/bias": (f"{name}/bias", "o")}
    return outer, block


def _tunix(embedding: str, norm: str) -> tuple[dict[str, Row], dict[str, Row]]:
    outer = {
        "model/embed_tokens/embedding": (f"embedder/{embedding}", "v d"),
        "model/norm/weight": (f"final_norm/{norm}", "d"),
        "lm_head/kernel": ("lm_head/w", _KERNEL),
    }
    block = {f"{name}/weight": (f"{name}/{norm}", "d") for name in ("input_layernorm", "post_attention_layernorm")}
    block |= {f"self_attn/{name}_norm/weight": (f"attn/{name}_norm/{norm}", "d") for name in "qk"}
    for name in "qkv":
        block[f"self_attn/{name}_proj/kernel"] = (f"attn/{name}_proj/w", _TO_HEADS)
        block[f"self_attn/{name}_proj/bias"] = (f"attn/{name}_bias", "o")
    block["self_attn/o_proj/kernel"] = ("attn/o_proj/w", _FROM_HEADS)
    block |= {f"mlp/{name}_proj/kernel": (f"mlp/{name}_proj/kernel", _KERNEL) for name in _MLP}
    return outer, block


_NAMES, _NAMES_BLOCK = _hugging_face("kernel", _KERNEL, "embedding")
_STATE_DICT, _STATE_DICT_BLOCK = _hugging_face("weight", _TORCH, "weight")
_TUNIX, _TUNIX_BLOCK = _tunix("input_embedding", "w")
_BONSAI, _BONSAI_BLOCK = _tunix("input_emb", "scale")

_KERAS: dict[str, Row] = {
    "model/embed_tokens/embedding": ("token_embedding/embeddings", "v d"),
    "model/norm/weight": ("sequence_output_layernorm/scale", "d"),
    "lm_head/kernel": ("token_embedding/reverse_embeddings", _KERNEL),
}
_KERAS_BLOCK: dict[str, Row] = {
    "input_layernorm/weight": ("self_attention_layernorm/scale", "d"),
    "self_attn/q_proj/kernel": ("self_attention/query/kernel", _TO_HEADS),
    "self_attn/q_proj/bias": ("self_attention/query/bias", "n h"),
    "self_attn/q_norm/weight": ("self_attention/query_dense_layernorm/scale", "d"),
    "self_attn/k_proj/kernel": ("self_attention/key/kernel", _TO_HEADS),
    "self_attn/k_proj/bias": ("self_attention/key/bias", "n h"),
    "self_attn/k_norm/weight": ("self_attention/key_dense_layernorm/scale", "d"),
    "self_attn/v_proj/kernel": ("self_attention/value/kernel", _TO_HEADS),
    "self_attn/v_proj/bias": ("self_attention/value/bias", "n h"),
    "self_attn/o_proj/kernel": ("self_attention/attention_output/kernel", _FROM_HEADS),
    "post_attention_layernorm/weight": ("feedforward_layernorm/scale", "d"),
    "mlp/gate_proj/kernel": ("feedforward_gate_dense/kernel", _KERNEL),
    "mlp/up_proj/kernel": ("feedforward_intermediate_dense/kernel", _KERNEL),
    "mlp/down_proj/kernel": ("feedforward_output_dense/kernel", _KERNEL),
}

_MAXTEXT: dict[str, Row] = {
    "model/embed_tokens/embedding": ("token_embedder/embedding", "v d"),
    "model/norm/weight": ("decoder/decoder_norm/scale", "d"),
    "lm_head/kernel": ("decoder/logits_dense/kernel", _KERNEL),
}
_MAXTEXT_BLOCK: dict[str, Row] = {
    "input_layernorm/weight": ("pre_self_attention_layer_norm/scale", "d"),
    "self_attn/q_proj/kernel": ("self_attention/query/kernel", _TO_HEADS),
    "self_attn/q_proj/bias": ("self_attention/query/bias", "n h"),
    "self_attn/q_norm/weight": ("self_attention/query_norm/scale", "d"),
    "self_attn/k_proj/kernel": ("self_attention/key/kernel", _TO_HEADS),
    "self_attn/k_proj/bias": ("self_attention/key/bias", "n h"),
    "self_attn/k_norm/weight": ("self_attention/key_norm/scale", "d"),
    "self_attn/v_proj/kernel": ("self_attention/value/kernel", _TO_HEADS),
    "self_attn/v_proj/bias": ("self_attention/value/bias", "n h"),
    "self_attn/o_proj/kernel": ("self_attention/out/kernel", _FROM_HEADS),
    "post_attention_layernorm/weight": ("post_self_attention_layer_norm/scale", "d"),
    "mlp/gate_proj/kernel": ("mlp/wi_0/kernel", _KERNEL),
    "mlp/up_proj/kernel": ("mlp/wi_1/kernel", _KERNEL),
    "mlp/down_proj/kernel": ("mlp/wo/kernel", _KERNEL),
}


def _maxtext(name: str, blocks: str, stack_at: int | None) -> Layout:
    # MaxText's Llama and Mistral do not divide by sqrt(head_dim): the kernel of q is initialised and loaded divided.
    # Its rotary embedding of Llama 3.1 turns neighbouring channels, every other one the halves of a head.
    return Layout(
        name=name,
        outer=_MAXTEXT,
        block=_MAXTEXT_BLOCK,
        blocks=blocks,
        stack_at=stack_at,
        scaled_queries=("llama", "mistral"),
        neighbours=("llama3",),
        families=_LLAMAS,
    )


flax = (
    Layout(name="Flax with Hugging Face names", outer=_NAMES, block=_NAMES_BLOCK, blocks=r"(?:model/)?layers[/_](\d+)"),
    Layout(
        name="Flax with Hugging Face names and stacked layers",
        outer=_NAMES,
        block=_NAMES_BLOCK,
        blocks=r"(?:model/)?layers",
        stack_at=0,
    ),
)
"""Flax modules with the names of Hugging Face and kernels [in, out], EasyDeL too; blocks may be stacked."""
hugging_face = (
    Layout(
        name="a Hugging Face state dict", outer=_STATE_DICT, block=_STATE_DICT_BLOCK, blocks=r"(?:model/)?layers/(\d+)"
    ),
)
"""State dicts of PyTorch, and ports of them: the names of Hugging Face, kernels [out, in] called `weight`."""
tunix = (Layout(name="tunix", outer=_TUNIX, block=_TUNIX_BLOCK, blocks=r"layers/(\d+)", families=_LLAMAS),)
"""Llama 3, Qwen 2 and Qwen 3 of tunix."""
bonsai = (Layout(name="bonsai", outer=_BONSAI, block=_BONSAI_BLOCK, blocks=r"layers/(\d+)", families=_LLAMAS),)
"""Qwen 3 of bonsai."""
keras_hub = (
    Layout(name="keras-hub", outer=_KERAS, block=_KERAS_BLOCK, blocks=r"transformer_layer_(\d+)", families=_LLAMAS),
)
"""Llama, Mistral, Qwen and Qwen 3 of keras-hub, as {v.path: v.value} or as nested dict."""
maxtext = (
    _maxtext("MaxText with scanned layers", "decoder/layers", 1),
    _maxtext("MaxText", r"decoder/layers[/_](\d+)", None),
)
"""Llama, Mistral, Qwen 2 and Qwen 3 of MaxText, scanned along axis 1 or not.

Where the rope type is llama3, the outputs of q and k are clustered in MaxText's order.
"""
auto = (*flax, *hugging_face, *tunix, *bonsai, *keras_hub, *maxtext)
"""All of them."""
