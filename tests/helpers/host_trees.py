"""Trees of parameters with the names and shapes of other codebases, built by hand from those of a FlaxLlama tree."""

import jax
import numpy as np

from cluscomp_jax.core import trees


def blocks_of(params, config):
    """Returns ({outer path: array}, [{block-relative path: array}]) as NumPy arrays."""
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    outer = {path: leaf for path, leaf in flat.items() if not path.startswith("model/layers/")}
    blocks = [
        {path.split("/", 3)[3]: leaf for path, leaf in flat.items() if path.startswith(f"model/layers/{i}/")}
        for i in range(config.num_hidden_layers)
    ]
    return outer, blocks


def nested(flat):
    """Returns the nested dict of {path: leaf}."""
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def linen_lists(params, config):
    """`layers_0`, …, kernels [in, out], norms called scale, under "params"."""
    outer, blocks = blocks_of(params, config)
    flat = {
        "embed_tokens/embedding": outer["model/embed_tokens/embedding"],
        "norm/scale": outer["model/norm/weight"],
        "lm_head/kernel": outer["lm_head/kernel"],
    }
    for i, block in enumerate(blocks):
        flat |= {f"layers_{i}/{path.replace('norm/weight', 'norm/scale')}": leaf for path, leaf in block.items()}
    return {"params": nested(flat)}


def integer_keys(params, config):
    """What nnx.to_pure_dict gives of a module with the names of Hugging Face."""
    outer, blocks = blocks_of(params, config)
    tree = nested(outer)
    tree["model"]["layers"] = {i: nested(block) for i, block in enumerate(blocks)}
    return tree


def easydel(params, config):
    """The names of Hugging Face, norms called kernel."""
    outer, blocks = blocks_of(params, config)
    renamed = {path.replace("norm/weight", "norm/kernel"): leaf for path, leaf in outer.items()}
    tree = nested(renamed)
    tree["model"]["layers"] = {
        i: nested({path.replace("norm/weight", "norm/kernel"): leaf for path, leaf in block.items()})
        for i, block in enumerate(blocks)
    }
    return tree


def stacked_names(params, config):
    """The names of Hugging Face, every array of a block [layers, …], as `lax.scan` takes them."""
    outer, blocks = blocks_of(params, config)
    stacked = {f"model/layers/{path}": np.stack([block[path] for block in blocks]) for path in blocks[0]}
    return nested(outer | stacked)


def state_dict(params, config):
    """Flat dotted names, kernels [out, in]."""
    outer, blocks = blocks_of(params, config)
    flat = outer | {f"model/layers/{i}/{path}": leaf for i, block in enumerate(blocks) for path, leaf in block.items()}
    found = {}
    for path, leaf in flat.items():
        *module, last = path.split("/")
        name = ".".join([*module, "bias" if last == "bias" else "weight"])
        found[name] = np.ascontiguousarray(leaf.T) if last == "kernel" else leaf
    return found


def _heads(config, path):
    return config.num_attention_heads if "q_proj" in path or "o_proj" in path else config.num_key_value_heads


def _by_heads(config, path, leaf):
    """[d, n, h] of q, k and v, [n, h, d] of o, [n, h] of biases."""
    heads, width = _heads(config, path), config.head_dim
    if path.endswith("bias"):
        return leaf.reshape(heads, width)
    if "o_proj" in path:
        return leaf.reshape(heads, width, -1)
    return leaf.reshape(-1, heads, width)


def _tunix(params, config, embedding, norm):
    outer, blocks = blocks_of(params, config)
    tree = {
        "embedder": {embedding: outer["model/embed_tokens/embedding"]},
        "final_norm": {norm: outer["model/norm/weight"]},
        "layers": {},
    }
    if "lm_head/kernel" in outer:
        tree["lm_head"] = {"w": outer["lm_head/kernel"]}
    for i, block in enumerate(blocks):
        layer = {name: {norm: block[f"{name}/weight"]} for name in ("input_layernorm", "post_attention_layernorm")}
        layer["mlp"] = {f"{x}_proj": {"kernel": block[f"mlp/{x}_proj/kernel"]} for x in ("gate", "up", "down")}
        attn = layer["attn"] = {}
        for x in "qkvo":
            path = f"self_attn/{x}_proj/kernel"
            attn[f"{x}_proj"] = {"w": _by_heads(config, path, block[path])}
        for x in "qk":
            if f"self_attn/{x}_norm/weight" in block:
                attn[f"{x}_norm"] = {norm: block[f"self_attn/{x}_norm/weight"]}
        for x in "qkv":
            if f"self_attn/{x}_proj/bias" in block:
                attn[f"{x}_bias"] = block[f"self_attn/{x}_proj/bias"]
        tree["layers"][i] = layer
    return tree


def tunix(params, config):
    """The pure dict of tunix."""
    return _tunix(params, config, "input_embedding", "w")


def bonsai(params, config):
    """The pure dict of bonsai."""
    return _tunix(params, config, "input_emb", "scale")


KERAS = {
    "input_layernorm/weight": "self_attention_layernorm/scale",
    "post_attention_layernorm/weight": "feedforward_layernorm/scale",
    "mlp/gate_proj/kernel": "feedforward_gate_dense/kernel",
    "mlp/up_proj/kernel": "feedforward_intermediate_dense/kernel",
    "mlp/down_proj/kernel": "feedforward_output_dense/kernel",
    "self_attn/q_norm/weight": "self_attention/query_dense_layernorm/scale",
    "self_attn/k_norm/weight": "self_attention/key_dense_layernorm/scale",
    "self_attn/q_proj": "self_attention/query",
    "self_attn/k_proj": "self_attention/key",
    "self_attn/v_proj": "self_attention/value",
    "self_attn/o_proj": "self_attention/attention_output",
}


def keras_hub(params, config):
    """{v.path: v.value} of a keras-hub backbone."""
    outer, blocks = blocks_of(params, config)
    flat = {
        "token_embedding/embeddings": outer["model/embed_tokens/embedding"],
        "token_embedding/reverse_embeddings": outer["lm_head/kernel"],
        "sequence_output_layernorm/scale": outer["model/norm/weight"],
    }
    for i, block in enumerate(blocks):
        for path, leaf in block.items():
            module, _, last = path.rpartition("/")
            attention = module in KERAS
            name = f"{KERAS[module]}/{last}" if attention else KERAS[path]
            flat[f"transformer_layer_{i}/{name}"] = _by_heads(config, path, leaf) if attention else leaf
    return flat


MAXTEXT = {
    "input_layernorm/weight": "pre_self_attention_layer_norm/scale",
    "post_attention_layernorm/weight": "post_self_attention_layer_norm/scale",
    "mlp/gate_proj/kernel": "mlp/wi_0/kernel",
    "mlp/up_proj/kernel": "mlp/wi_1/kernel",
    "mlp/down_proj/kernel": "mlp/wo/kernel",
    "self_attn/q_norm/weight": "self_attention/query_norm/scale",
    "self_attn/k_norm/weight": "self_attention/key_norm/scale",
    "self_attn/q_proj": "self_attention/query",
    "self_attn/k_proj": "self_attention/key",
    "self_attn/v_proj": "self_attention/value",
    "self_attn/o_proj": "self_attention/out",
}


def _maxtext_block(block, config):
    """One block as MaxText's converter makes it of a Hugging Face model."""
    found = {}
    for path, leaf in block.items():
        module, _, last = path.rpartition("/")
        if module not in MAXTEXT:
            found[MAXTEXT[path]] = leaf
            continue
        leaf = _by_heads(config, path, leaf)
        if config.rope.rope_type == "llama3" and module in ("self_attn/q_proj", "self_attn/k_proj"):
            half = config.head_dim // 2
            order = [j // 2 + (j % 2) * half for j in range(config.head_dim)]
            leaf = leaf[..., order]
        if config.model_type in ("llama", "mistral") and module == "self_attn/q_proj":
            leaf = leaf / np.float32(np.sqrt(config.head_dim))
        found[f"{MAXTEXT[module]}/{last}"] = leaf
    return found


def from_maxtext(tree, config):
    """Returns a FlaxLlama tree of MaxText's, scanned or not: the way back of `maxtext` and `maxtext_scanned`."""
    decoder, half = tree["params"]["decoder"], config.head_dim // 2
    back = [2 * j if j < half else 2 * (j - half) + 1 for j in range(config.head_dim)]
    blocks = {}
    for i in range(config.num_hidden_layers):
        layer = decoder.get(f"layers_{i}") or jax.tree.map(lambda leaf, i=i: leaf[:, i], decoder["layers"])
        flat = {}
        for module, theirs in MAXTEXT.items():
            node = layer
            for name in theirs.split("/"):
                node = node.get(name, {})
            for last, leaf in node.items() if isinstance(node, dict) else [("", node)]:
                leaf = np.asarray(leaf)
                if module.endswith(("q_proj", "k_proj")) and config.rope.rope_type == "llama3":
                    leaf = leaf[..., back]
                if module.endswith("q_proj") and config.model_type in ("llama", "mistral"):
                    leaf = leaf * np.float32(np.sqrt(config.head_dim))
                if last == "kernel":
                    leaf = leaf.reshape((-1, config.hidden_size) if "o_proj" in module else (config.hidden_size, -1))
                flat[f"{module}/{last}" if last else module] = leaf.reshape(-1) if last == "bias" else leaf
        blocks[str(i)] = nested(flat)
    outer = {
        "embed_tokens": {"embedding": tree["params"]["token_embedder"]["embedding"]},
        "norm": {"weight": decoder["decoder_norm"]["scale"]},
        "layers": blocks,
    }
    return {"model": outer, "lm_head": {"kernel": decoder["logits_dense"]["kernel"]}}


def _maxtext_outer(params, config):
    outer, blocks = blocks_of(params, config)
    flat = {
        "token_embedder/embedding": outer["model/embed_tokens/embedding"],
        "decoder/decoder_norm/scale": outer["model/norm/weight"],
    }
    if "lm_head/kernel" in outer:
        flat["decoder/logits_dense/kernel"] = outer["lm_head/kernel"]
    return flat, [_maxtext_block(block, config) for block in blocks]


def maxtext(params, config):
    """MaxText without scan."""
    flat, blocks = _maxtext_outer(params, config)
    for i, block in enumerate(blocks):
        flat |= {f"decoder/layers_{i}/{path}": leaf for path, leaf in block.items()}
    return {"params": nested(flat)}


def maxtext_scanned(params, config):
    """MaxText with scan: blocks are stacked along axis 1."""
    flat, blocks = _maxtext_outer(params, config)
    flat |= {f"decoder/layers/{path}": np.stack([block[path] for block in blocks], axis=1) for path in blocks[0]}
    return {"params": nested(flat)}
