"""A decoder in float64 NumPy, written from the papers' formulas, one token and one head at a time; no code of ours.

RMSNorm: arXiv 1910.07467. Rotary embeddings: 2104.09864, written as complex rotations. Grouped queries: 2305.13245.
SwiGLU: 2002.05202. Sliding windows: 2310.06825.
"""

import math

import numpy as np


def norm(x, weight, eps):
    return x / math.sqrt(np.mean(x**2) + eps) * weight


def turn(vector, position, theta):
    half = len(vector) // 2
    pairs = vector[:half] + 1j * vector[half:]
    turned = pairs * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def apply(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def attend(params, xs, c, window):
    queries, keys, values = ([apply(params[f"{n}_proj"], x).reshape(-1, c.head_dim) for x in xs] for n in "qkv")
    if "q_norm" in params:
        queries = [np.array([norm(h, params["q_norm"]["weight"], c.rms_norm_eps) for h in q]) for q in queries]
        keys = [np.array([norm(h, params["k_norm"]["weight"], c.rms_norm_eps) for h in k]) for k in keys]
    sharing = c.num_attention_heads // c.num_key_value_heads
    mixed_precision = []
    for t in range(len(xs)):
        first = 0 if window is None else max(0, t - window + 1)
        heads = []
        for j in range(c.num_attention_heads):
            query = turn(queries[t][j], t, c.rope.theta)
            seen = range(first, t + 1)
            scores = np.array([query @ turn(keys[s][j // sharing], s, c.rope.theta) for s in seen])
            weights = np.exp(scores / math.sqrt(c.head_dim))
            heads.append(sum(w * values[s][j // sharing] for w, s in zip(weights / weights.sum(), seen, strict=True)))
        mixed_precision.append(np.concatenate(heads))
    return [apply(params["o_proj"], m) for m in mixed_precision]


def logits(params, tokens, c, windows):
    """[t, v] float64 of int tokens [t]; windows: per layer the latest positions seen, None for all."""
    xs = [params["model"]["embed_tokens"]["embedding"][token] for token in tokens]
    for i, window in enumerate(windows):
        layer = params["model"]["layers"][str(i)]
        normed = [norm(x, layer["input_layernorm"]["weight"], c.rms_norm_eps) for x in xs]
        xs = [x + y for x, y in zip(xs, attend(layer["self_attn"], normed, c, window), strict=True)]
        for t, x in enumerate(xs):
            y = norm(x, layer["post_attention_layernorm"]["weight"], c.rms_norm_eps)
            gate = apply(layer["mlp"]["gate_proj"], y)
            hidden = gate / (1 + np.exp(-gate)) * apply(layer["mlp"]["up_proj"], y)
            xs[t] = x + apply(layer["mlp"]["down_proj"], hidden)
    final = np.array([norm(x, params["model"]["norm"]["weight"], c.rms_norm_eps) for x in xs])
    if c.tie_word_embeddings:
        return final @ params["model"]["embed_tokens"]["embedding"].T
    return final @ params["lm_head"]["kernel"]
