"""GGUF files of every family whose converter there is: named by the map of the gguf package itself, with the changes
that llama.cpp's converter makes to the weights.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from family_cases import fields_of
from io_models import interleave_halves

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.gguf.config import config_fields
from cluscomp_jax.io.gguf.source import GgufSource
from cluscomp_jax.models.model import build_model, parameter_shapes, parse_model_config
from cluscomp_jax.models.source import load_all

CASES = {
    "smollm3": "SMOLLM3",
    "granite": "GRANITE",
    "olmo2": "OLMO2",
    "olmo3": "OLMO2",
    "gemma2": "GEMMA2",
    "gemma3": "GEMMA3",
    "phi4": "PHI3",
    "phi4_mini": "PHI3",
    "ministral3": "MISTRAL3",
    "seed_oss_biased": "SEED_OSS",
    "mixtral": "LLAMA",
    "qwen3_moe": "QWEN3MOE",
}
"""{case: name of its architecture in the gguf package, of which older releases know fewer}."""
CHANGES: dict[str, dict[str, Any]] = {
    "olmo3": {"rope_scaling": None},
    "seed_oss_biased": {"mlp_bias": False},
}
"""What GGUF cannot say, or llama.cpp's map has no name for."""
EXPERTS = {"LLAMA": "layers.{}.feed_forward.experts.w{}", "QWEN3MOE": "model.layers.{}.mlp.experts.{}"}
"""{architecture: the name under which llama.cpp's converter stacks the matrices of a block's experts}."""
FUSED = {"self_attn/qkv_proj": ("q", "k", "v"), "mlp/gate_up_proj": ("gate", "up")}


def stored_tensors(config: Any, flat: dict[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    """Returns {GGUF name: array} of parameters; names by the gguf package, of the names of Hugging Face."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_hidden_layers)
    hugging_face = {path.rpartition("/")[0]: None for path in flat}
    assert hugging_face
    found: dict[str, list[np.ndarray]] = {}
    for path, array in flat.items():
        module, _, leaf = path.rpartition("/")
        rows = array.T if leaf == "kernel" else array
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        name = module.rpartition("/")[2]
        if arch in ("SMOLLM3", "GRANITE", "MISTRAL3", "LLAMA") and name in heads:
            rows = interleave_halves(rows, heads[name])
        if arch in ("GEMMA2", "GEMMA3") and leaf == "weight":
            rows = rows + 1
        if arch == "PHI3":
            for stored, parts in FUSED.items():
                if name.removesuffix("_proj") in parts and module.rpartition("/")[0].endswith(stored.split("/")[0]):
                    module = f"{module.rpartition('/')[0]}/{stored.rpartition('/')[2]}"
        if "/experts/" in module:
            which = {"gate_proj": 1, "up_proj": 3, "down_proj": 2}[name] if arch == "LLAMA" else name
            module, rows = EXPERTS[arch].format(module.split("/")[2], which), rows[None]
        module = module.replace("mlp/router", "block_sparse_moe/gate" if arch == "LLAMA" else "mlp/gate")
        whole = f"{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"
        gguf_name = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, whole
        found.setdefault(gguf_name, []).append(rows)
    return {name: np.concatenate(parts).astype(np.float32) for name, parts in found.items()}


def write(path: Path, case: str, config: Any, flat: dict[str, np.ndarray], metadata: Any = None) -> Path:
    fields, arch = fields_of(case) | CHANGES.get(case, {}), CASES[case]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(dict(config.extra).get("intermediate_size", config.intermediate_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if arch != "PHI3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_position)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if arch == "GRANITE":
        writer.add_attention_scale(fields["attention_multiplier"])
        writer.add_embedding_scale(fields["embedding_multiplier"])
        writer.add_residual_scale(fields["residual_multiplier"])
        writer.add_logit_scale(fields["logits_scaling"])
    if "rope_theta" in fields:
        writer.add_rope_freq_base(fields["rope_theta"])
    if fields.get("sliding_window"):
        writer.add_sliding_window(fields["sliding_window"])
    if case == "olmo3":
        pattern = [kind == "sliding_attention" for kind in fields["layer_types"]]
        writer.add_array("olmo2.attention.sliding_window_pattern", pattern)
    if case == "gemma2":
        writer.add_attn_logit_softcapping(fields["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(fields["final_logit_softcapping"])
    if arch == "PHI3":
        writer.add_rope_dimension_count(config.rotated)
        writer.add_rope_scaling_orig_ctx_len(fields.get("original_max_position_embeddings", 64))
    if case == "ministral3":
        rope = fields["rope_parameters"]
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_float32("mistral3.attention.temperature_scale", rope["llama_4_scaling_beta"])
    if metadata is not None:
        metadata(writer)
    tensors = stored_tensors(config, flat, arch)
    if case == "phi4_mini":
        for kind in ("long", "short"):
            tensors[f"rope_factors_{kind}.weight"] = np.array(fields["rope_scaling"][f"{kind}_factor"], np.float32)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def problem(case: str) -> tuple[Any, dict[str, np.ndarray]]:
    if CASES[case] not in gguf.MODEL_ARCH.__members__:
        pytest.skip(f"this release of gguf has no map of {CASES[case]}")
    fields = fields_of(case) | CHANGES.get(case, {}) | {"pad_token_id": None}
    if case == "phi4":
        fields["original_max_position_embeddings"] = 64  # a GGUF file has it
    config = parse_model_config(fields)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(build_model(config))
    # Few bits, so that adding 1 to a norm and taking it off again is exact.
    return config, {path: rng.integers(-64, 64, shape).astype(np.float32) / 64 for path, shape in shapes.items()}


@pytest.mark.parametrize("case", CASES)
def test_config_and_weights_arrive(case: str, tmp_path: Path) -> None:
    config, flat = problem(case)
    source = GgufSource(write(tmp_path / "m.gguf", case, config, flat), dtype=np.float32)
    assert source.model_config == config
    found = trees.flatten(load_all(source, source.model))
    assert found.keys() == flat.keys()
    for path, array in flat.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize(
    ("case", "metadata", "message"),
    [
        ("ministral3", lambda w: w.add_rope_scaling_attn_factors(2.0), "rope.scaling.attn_factor"),
        ("olmo3", lambda w: w.add_rope_scaling_attn_factors(2.0), "rope.scaling.attn_factor"),
        ("gemma3", lambda w: w.add_final_logit_softcapping(-1.0), "logits_softcap is -1.0"),
        ("granite", lambda w: w.add_sliding_window(4), None),
        (
            "gemma2",
            lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)),
            r"rope_factors_long\.weight \[4\] is used by nothing",
        ),
        ("phi4", lambda w: w.add_string("phi3.embedding_scale", "x"), "phi3.embedding_scale"),
    ],
)
def test_what_a_header_says_and_is_not_served_is_refused(
    case: str, metadata: Any, message: str | None, tmp_path: Path
) -> None:
    config, flat = problem(case)
    path = write(tmp_path / "m.gguf", case, config, flat, metadata)
    with pytest.raises(InputError, match=message or "sliding_window 4 is not supported") as caught:
        GgufSource(path)
    assert "\n" not in str(caught.value)


def test_a_window_of_mixtral_arrives(tmp_path: Path) -> None:
    config, flat = problem("mixtral")
    path = write(tmp_path / "m.gguf", "mixtral", config, flat, lambda w: w.add_sliding_window(8))
    assert GgufSource(path).model_config.window(0) == 8


def test_forged_experts_are_refused(tmp_path: Path) -> None:
    config, flat = problem("mixtral")
    tensors = {f"blk.{i}.ffn_odd_exps.weight": np.zeros((40_000, 1, 1), np.float32) for i in range(3)}

    def forge(writer: Any) -> None:
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)

    with pytest.raises(InputError, match="more than 100,000 tensors"):
        GgufSource(write(tmp_path / "m.gguf", "mixtral", config, flat, forge))


def test_a_family_without_such_files_is_refused_by_name() -> None:
    shapes = {"token_embd.weight": (4, 8)}
    with pytest.raises(InputError, match="architecture 'opt' is not read from GGUF files; use the Hugging"):
        config_fields({"general.architecture": "opt"}, shapes, lambda name: np.zeros(shapes[name], np.float32))
