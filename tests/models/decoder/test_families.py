"""Every family: its config there and back, its tensors by name, cached decoding against the whole pass, a compressed
copy through a folder. What PyTorch computes is in tests/parity.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, SIZES, fields_of, random_params

from cluscomp_jax import CalibrationConfig, ClusterConfig, CompressConfig, CompressionRule, compress, generate
from cluscomp_jax.checkpoint.reader import open_checkpoint, save_checkpoint
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.models.decoder import DecoderConfig, LayerKind, forward
from cluscomp_jax.models.model import build_model, model_config_to_dict, parameter_shapes, parse_model_config
from cluscomp_jax.models.source import load_all
from cluscomp_jax.models.tensor_names import match_tensors, names_of, stored_shape

ONE_OF_EACH = (
    "smollm3_window", "granite_biased", "olmo3_nested", "gemma2", "gemma3", "opt", "opt_post_norm", "phi4_mini",
    "ministral3_window", "seed_oss_biased", "mixtral_window", "qwen3_moe_shares",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_configs_come_back_from_their_fields(name: str) -> None:
    config = parse_model_config(fields_of(name))
    assert isinstance(config, DecoderConfig)
    assert hash(config) == hash(parse_model_config(fields_of(name)))
    assert parse_model_config(model_config_to_dict(config)) == config


@pytest.mark.parametrize("name", CASES)
def test_every_stored_tensor_is_found_and_every_parameter_stored(name: str) -> None:
    model = build_model(parse_model_config(fields_of(name)))
    shapes, names = parameter_shapes(model), names_of(model.config, "hugging_face")
    stored = {names.name(path): names.paths(names.name(path)) for path in shapes}
    found, _ = match_tensors({n: stored_shape(paths, shapes) for n, paths in stored.items()}, model, names, "here")
    assert found.keys() == shapes.keys()
    assert sorted(path for paths in stored.values() for path in paths) == sorted(shapes)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_cached_generation_gives_the_tokens_of_the_whole_pass(name: str) -> None:
    config = parse_model_config(fields_of(name))
    params = random_params(config)
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, 11)
    tokens = list(prompt)
    for _ in range(6):
        tokens.append(int(np.argmax(np.asarray(forward(params, np.array([tokens + [0] * (17 - len(tokens))]), config))
                                    [0, len(tokens) - 1])))  # fmt: skip
    drawn = generate(params, prompt, config, max_new_tokens=6)
    np.testing.assert_array_equal(drawn, tokens[len(prompt) :])


def test_longrope_takes_the_long_factors_beyond_the_original_context() -> None:
    config = parse_model_config(fields_of("phi4_mini"))
    params, tokens = random_params(config), np.random.default_rng(0).integers(0, 96, (1, 21))
    short = forward(params, tokens[:, :20], config)
    long = forward(params, tokens, config)
    assert np.abs(np.asarray(long[:, :20] - short)).max() > 1e-3


def test_blocks_of_one_kind_share_a_program() -> None:
    model = build_model(parse_model_config(fields_of("gemma3")))
    kinds = [model.layer_type(i) for i in range(model.num_blocks)]
    assert len(kinds) == 7
    assert len(set(kinds)) == 2
    local, whole = kinds[0], kinds[5]
    assert isinstance(local, LayerKind)
    assert isinstance(whole, LayerKind)
    assert (local.window, whole.window) == (6, None)
    assert local.rope is not None
    assert whole.rope is not None
    assert (local.rope.theta, whole.rope.theta) == (1e4, 1e6)


@pytest.mark.parametrize("name", ["granite_biased", "gemma2", "olmo2_groups", "opt"])
def test_the_observed_residual_is_in_the_unit_of_the_projection(name: str) -> None:
    config = parse_model_config(fields_of(name))
    model, params = build_model(config), random_params(config)
    block = trees.subtree(params, "model/layers/0")
    x = model.embed(params, np.arange(8).reshape(1, 8), dtype=jnp.float32)
    y, seen = model.block(
        block, x, layer_type=model.layer_type(0), observer=lambda _, value, residual, weights: (value, residual)
    )
    assert seen.keys() == model.input_groups.keys()
    hidden, residual = seen["mlp/hidden"]
    if config.norms != "pre":
        assert residual is None
        return
    down = block["mlp"]["down_proj"]
    expected = (residual + hidden @ down["kernel"] + down.get("bias", 0)) * config.residual_multiplier
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma3", "opt", "opt_post_norm", "phi4_mini"])
def test_compressed_saved_loaded_evaluated(name: str, tmp_path: Any) -> None:
    config = parse_model_config(fields_of(name) | {"num_hidden_layers": 2, "layer_types": None})
    params, tokens = random_params(config), np.random.default_rng(2).integers(0, 96, (4, 12))
    cfg = CompressConfig(
        model=config,
        cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=64),), iterations=2),
        tuning=BlockTuningConfig(epochs=1, batch_size=2, validation_samples=0),
        calibration=CalibrationConfig(samples=4, length=12),
    )
    small = compress(params, cfg, calibration=tokens)
    coded = [leaf for leaf in trees.flatten(small).values() if isinstance(leaf, CodebookArray)]
    assert len(coded) == 2 * sum(map(len, build_model(config).input_groups.values()))
    save_checkpoint(tmp_path / "small", small, cfg)
    source = open_checkpoint(tmp_path / "small")
    assert source.model_config == config
    loaded = load_all(source, build_model(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, small)
    stream = np.random.default_rng(3).integers(0, 96, 50)
    found, expected = (perplexity(each, stream, config, context=16) for each in (source, params))
    assert found.perplexity == pytest.approx(perplexity(small, stream, config, context=16).perplexity)
    assert found.perplexity < 3 * expected.perplexity


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is not set"),
        ("smollm3", {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ("smollm3", {"num_experts": 4}, "num_experts is 4"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0.0"),
        ("granite", {"sliding_window": 8}, "sliding_window is 8"),
        ("granite4", {"num_local_experts": 4}, "num_local_experts is 4"),
        ("granite4", {"layer_types": ["attention", "mamba"] * 2}, "only layers of 'attention'"),
        ("granite4", {"layer_types": ["attention"] * 3}, "layer_types names 3 layers"),
        ("granite4", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmo2", {"sliding_window": 8}, "sliding_window is 8"),
        ("olmo3", {"sliding_window": None}, "sliding_window is not set"),
        ("olmo3", {"sliding_window": 0}, "sliding_window is 0"),
        ("olmo3_nested", {"rope_parameters": {"full_attention": {}, "factor": 2.0}}, "'factor' next to"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern is 3"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_softcap is -1.0"),
        ("gemma3", {"hidden_activation": "tanh"}, "hidden_act is 'tanh'"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ("phi3", {"rope_scaling": {"type": "llama3"}}, "rope type 'llama3'"),
        ("phi4_mini", {"partial_rotary_factor": 0.4}, "of the 8 channels"),
        ("phi4_mini", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("phi4_mini", {"partial_rotary_factor": 0.5}, "3 numbers; 2 pairs"),
        ("ministral3", {"rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta is missing"),
        ("opt", {"ffn_dim": None}, "ffn_dim is missing"),
        ("opt", {"activation_function": "tanh"}, "hidden_act is 'tanh'"),
        ("opt", {"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0"),
        ("opt", {"enable_bias": "yes"}, "enable_bias is 'yes'"),
        ("opt", {"num_attention_heads": 5}, "is no multiple of num_attention_heads 5"),
        ("opt", {"num_local_experts": 4}, "num_local_experts is 4"),
        ("seed_oss", {"head_dim": 7}, "of the 7 channels"),
        ("seed_oss", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be an integer from 1 to the 8"),
        ("mixtral", {"num_local_experts": 10**9}, "the number of experts is 1000000000"),
        ("mixtral", {"num_local_experts": 2**16}, "all layers together have 262144 experts"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "intermediate_size is 0"),
    ],
)
def test_what_is_not_served_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_model_config(fields_of(name) | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phi4", r"phi3 stores several matrices as one \(self_attn.qkv_proj"),
        ("qwen3_moe", "qwen3_moe is a mixture of experts"),
    ],
)
def test_aqlm_is_refused_before_any_work_where_it_cannot_hold_the_matrices(name: str, message: str) -> None:
    config = parse_model_config(fields_of(name))
    cfg = CompressConfig(model=config, cluster=ClusterConfig(export="aqlm"), tuning=None)
    with pytest.raises(InputError, match=message):
        compress(random_params(config), cfg)


def test_the_old_names_of_longrope_mean_it() -> None:
    new, old = (fields_of("phi4_mini") for _ in range(2))
    old["rope_scaling"] = new["rope_scaling"] | {"type": "su"}
    assert parse_model_config(old) == parse_model_config(new)


def test_a_config_made_by_hand_is_checked_too() -> None:
    sizes = {name: value for name, value in SIZES.items() if not name.endswith("token_id")}
    with pytest.raises(InputError, match="norms is 'around'"):
        DecoderConfig(model_type="x", head_dim=8, layers=(LayerKind(),) * 4, norms="around", **sizes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 kinds of layers"):
        DecoderConfig(model_type="x", head_dim=8, layers=(LayerKind(),) * 3, **sizes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="norm is 'layer' and qk_norm 'head'"):
        DecoderConfig(model_type="x", head_dim=8, layers=(LayerKind(),) * 4, norm="layer", qk_norm="head", **sizes)  # type: ignore[arg-type]
