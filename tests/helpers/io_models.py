"""Tiny models in others' file formats, written with those formats' own writers. Shares no code with the readers."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

HIDDEN, MLP, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 40, 2, 4, 2, 16


def config_fields(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    fields = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    return fields | changes


def hf_tensors(
    model_type: str = "llama",
    *,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dtype: Any = np.float32,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """{Hugging Face name: array}, as a PyTorch state dict of the family has them."""
    random = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        block = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (q, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, q),
            "mlp.gate_proj.weight": (MLP, HIDDEN),
            "mlp.up_proj.weight": (MLP, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, MLP),
        }
        if model_type == "qwen3":
            block |= {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
        if attention_bias or model_type == "qwen2":
            block |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        if attention_bias:
            block |= {"self_attn.o_proj.bias": (HIDDEN,)}
        if mlp_bias:
            block |= {"mlp.gate_proj.bias": (MLP,), "mlp.up_proj.bias": (MLP,), "mlp.down_proj.bias": (HIDDEN,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(folder: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: array for n, (name, array) in enumerate(sorted(tensors.items())) if n % shards == s}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name: str) -> str:
    module, _, leaf = hf_name.rpartition(".")
    if module.startswith("model.layers."):
        number, _, module = module.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{_GGUF_NAMES[module]}.{leaf}"
    return f"{_GGUF_NAMES[module]}.{leaf}"


def interleave_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama architecture: pair (j, j + d/2) becomes (2j, 2j+1)."""
    out = np.empty_like(rows)
    d = rows.shape[0] // heads
    for head in range(heads):
        for j in range(d // 2):
            out[head * d + 2 * j] = rows[head * d + j]
            out[head * d + 2 * j + 1] = rows[head * d + d // 2 + j]
    return out


class _Writer(gguf.GGUFWriter):
    """One whose keys may be set again, which releases of gguf before 0.17.1 refuse."""

    def add_key_value(self, key: str, *arguments: Any, **options: Any) -> None:
        for part in self.kv_data:
            part.pop(key, None)
        super().add_key_value(key, *arguments, **options)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    arch: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    metadata: Any = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    tensors_per_part: int = 0,
) -> Path:
    """Writes Hugging Face tensors as llama.cpp's converter would; matrices in `kind`, the rest in float32.

    metadata: called with the writer, to add or override keys.
    tensors_per_part: writes parts NAME-00001-of-0000N.gguf of so many tensors; 0: one file.
    """
    writer = _Writer(path, arch, endianess=endianess, split_max_tensors=tensors_per_part)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    if metadata is not None:
        metadata(writer)
    for name, array in tensors.items():
        stored = array
        if arch == "llama" and ".q_proj." in name:
            stored = interleave_halves(array, HEADS)
        elif arch == "llama" and ".k_proj." in name:
            stored = interleave_halves(array, KV_HEADS)
        if array.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
