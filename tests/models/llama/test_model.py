"""The decoder: against a float64 oracle over random configs, cached against whole, and its contract with Model."""

import itertools

import chex
import jax
import jax.numpy as jnp
import llama_oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llamas import MIXED, SMALL, WINDOWED, random_params, random_tokens

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.llama import LlamaConfig, LlamaModel, RopeConfig, build, forward, init_params
from cluscomp_jax.models.model import Model


@st.composite
def configs(draw):
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    window = None if family == "llama" else draw(st.none() | st.integers(1, 8))
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    mixed_precision = window is not None and family.startswith("qwen")
    return LlamaConfig(
        model_type=family,
        vocab_size=draw(st.integers(2, 20)),
        hidden_size=draw(st.integers(1, 16)),
        intermediate_size=draw(st.integers(1, 16)),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 5)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        tie_word_embeddings=draw(st.booleans()),
        rope=RopeConfig(theta=draw(st.sampled_from([10.0, 10000.0]))),
        sliding_window=window,
        layer_types=tuple(draw(st.lists(kinds, min_size=layers, max_size=layers))) if mixed_precision else (),
        attention_bias=family in ("llama", "qwen3") and draw(st.booleans()),
        mlp_bias=family == "llama" and draw(st.booleans()),
    )


@settings(max_examples=6)
@given(config=configs(), seed=st.integers(0, 1000))
def test_logits_equal_the_float64_oracle(config, seed):
    params, tokens = random_params(config, seed), random_tokens(config, (1, 11), seed)
    wide = trees.map_by_path(lambda _, leaf: np.asarray(leaf, np.float64), params)
    windows = [
        config.sliding_window if layer_type == "sliding_attention" else None for layer_type in config.layer_types
    ]
    expected = llama_oracle.logits(wide, tokens[0], config, windows)
    actual = forward(params, tokens, config)[0]
    chex.assert_tree_all_finite(actual)
    assert np.abs(actual - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-3)


def cached_logits(config, params, tokens, bounds, length):
    model = build(config)
    step = jax.jit(model.cached_block, static_argnames="layer_type")
    caches = [model.init_cache(i, len(tokens), length, jnp.float32) for i in range(model.num_blocks)]
    embedded = model.embed(params, tokens, dtype=jnp.float32)
    pieces = []
    for start, end in itertools.pairwise(bounds):
        x = embedded[:, start:end]
        for i in range(model.num_blocks):
            block = trees.subtree(params, f"{model.blocks_path}/{i}")
            x, caches[i] = step(block, x, caches[i], jnp.int32(start), layer_type=model.layer_type(i))
        pieces.append(np.asarray(x))
    return np.asarray(model.head(params, np.concatenate(pieces, axis=1)))


@pytest.mark.parametrize("bounds", [(0, 4, 8, 9, 10), tuple(range(11))], ids=["chunks", "single"])
@pytest.mark.parametrize("config", [WINDOWED, MIXED], ids=["mistral", "qwen3"])
def test_cached_decoding_equals_forward(config, bounds):
    params, tokens = random_params(config), random_tokens(config, (2, 10))
    actual = cached_logits(config, params, tokens, bounds, length=13)
    chex.assert_trees_all_close(actual, np.asarray(forward(params, tokens, config)), atol=2e-5)


def test_cached_dynamic_rope_reads_the_length_so_far():
    rope = RopeConfig(rope_type="dynamic", factor=4.0, original_max_positions=6)
    config = LlamaConfig(rope=rope, **{**SMALL, "num_hidden_layers": 1})
    params, tokens = random_params(config), random_tokens(config, (1, 10))
    whole = forward(params, tokens, config)
    chex.assert_trees_all_close(cached_logits(config, params, tokens, (0, 10), 10), np.asarray(whole), atol=2e-5)
    within = cached_logits(config, params, tokens[:, :6], range(7), 10)
    chex.assert_trees_all_close(within, np.asarray(forward(params, tokens[:, :6], config)), atol=2e-5)
    assert np.abs(within - whole[:, :6]).max() > 1e-3


def test_no_token_sees_the_future_and_windows_end_where_they_say():
    config = LlamaConfig(model_type="mistral", sliding_window=3, **{**SMALL, "num_hidden_layers": 1})
    params, tokens = random_params(config), random_tokens(config, (1, 9))
    changed = tokens.copy()
    changed[0, 4] = (tokens[0, 4] + 1) % config.vocab_size
    difference = np.abs(forward(params, tokens, config) - forward(params, changed, config))[0].max(axis=-1)
    assert (difference[:4] == 0).all()
    assert (difference[4:7] > 1e-5).all()
    assert (difference[7:] == 0).all()


def test_tied_embeddings_equal_an_untied_copy():
    tied = LlamaConfig(tie_word_embeddings=True, **SMALL)
    params = random_params(tied)
    assert "lm_head" not in params
    copy = {**params, "lm_head": {"kernel": params["model"]["embed_tokens"]["embedding"].T}}
    tokens = random_tokens(tied, (2, 5))
    actual, expected = forward(params, tokens, tied), forward(copy, tokens, LlamaConfig(**SMALL))
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


def test_integer_layer_keys_are_the_same_parameters():
    params, tokens = random_params(MIXED), random_tokens(MIXED, (1, 5))
    layers = {int(i): layer for i, layer in params["model"]["layers"].items()}
    numbered = {**params, "model": {**params["model"], "layers": layers}}
    chex.assert_trees_all_equal(forward(numbered, tokens, MIXED), forward(params, tokens, MIXED))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_compute_dtype_is_that_of_x(dtype):
    model, params = build(MIXED), random_params(MIXED)

    def run(params, tokens):
        block = trees.subtree(params, "model/layers/1")
        x = model.embed(params, tokens, dtype=dtype)
        empty = model.init_cache(1, 1, 6, dtype)
        y, cache = model.cached_block(block, x, empty, jnp.int32(0), layer_type=4)
        return (x, model.block(block, x, layer_type=4), y, cache["keys"], cache["values"]), model.head(params, x)

    *inner, logits = jax.tree.leaves(jax.eval_shape(run, params, random_tokens(MIXED, (1, 4))))
    assert {leaf.dtype for leaf in inner} == {jnp.dtype(dtype)}
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("config", [WINDOWED, MIXED, LlamaConfig(attention_bias=True, mlp_bias=True, **SMALL)])
def test_shapes_sites_and_kinds_describe_the_parameters(config):
    model = build(config)
    assert isinstance(model, Model)
    assert hash(model) == hash(LlamaModel(config))
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    for i in range(model.num_blocks):
        flat = trees.flatten(trees.subtree(params, f"{model.blocks_path}/{i}"))
        assert {path: leaf.shape for path, leaf in flat.items()} == model.block_shapes(i)
        assert {path for paths in model.input_groups.values() for path in paths} == {
            p for p in flat if p.endswith("kernel")
        }
        assert model.layer_type(i) == config.window(i)
    outer = trees.flatten(trees.without(params, model.blocks_path))
    assert {path: leaf.shape for path, leaf in outer.items()} == model.outer_shapes()


def test_initial_parameters_follow_the_key():
    config = LlamaConfig(attention_bias=True, **SMALL)
    first, again = (trees.flatten(init_params(config, jax.random.key(3))) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    queries = [first[f"model/layers/{i}/self_attn/q_proj/kernel"] for i in range(2)]
    assert not np.array_equal(*queries)
    assert np.std(queries) == pytest.approx(0.3, rel=0.1)
    assert (first["model/norm/weight"] == 1).all()
    assert (first["model/layers/0/self_attn/o_proj/bias"] == 0).all()


def test_taps_see_the_input_of_every_kernel():
    model, params = build(MIXED), random_params(MIXED)
    block = trees.subtree(params, "model/layers/0")
    x = model.embed(params, random_tokens(MIXED, (2, 5)), dtype=jnp.float32)
    y, both = jax.jit(lambda block, x: model.block(block, x, layer_type=None, observer=lambda group, *seen: seen))(
        block, x
    )
    tapped = {group: value for group, (value, *_) in both.items()}
    assert tapped.keys() == model.input_groups.keys()
    for group, paths in model.input_groups.items():
        for path in paths:
            assert tapped[group].shape == (2, 5, model.block_shapes(0)[path][0])
    gate, up = (tapped["mlp/input"] @ block["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up"))
    chex.assert_trees_all_close(tapped["mlp/hidden"], gate / (1 + jnp.exp(-gate)) * up, atol=1e-5)
    after_attention = x + tapped["self_attn/output"] @ block["self_attn"]["o_proj"]["kernel"]
    down = tapped["mlp/hidden"] @ block["mlp"]["down_proj"]["kernel"]
    chex.assert_trees_all_close(y, after_attention + down, atol=1e-5)
    residuals = {group: residual for group, (_, residual, _) in both.items()}
    chex.assert_trees_all_close(residuals["self_attn/output"], x)
    chex.assert_trees_all_close(residuals["mlp/hidden"], after_attention, atol=1e-5)
    assert residuals["self_attn/input"] is None
    assert residuals["mlp/input"] is None


def test_block_gradients_match_finite_differences():
    model, params = build(WINDOWED), random_params(WINDOWED)
    block = trees.subtree(params, "model/layers/0")
    x = model.embed(params, random_tokens(WINDOWED, (1, 6)), dtype=jnp.float32)
    rng = np.random.default_rng(5)
    probe = rng.normal(size=x.shape).astype(np.float32)
    direction = trees.map_by_path(lambda _, leaf: rng.normal(size=leaf.shape).astype(np.float32), block)

    @jax.jit
    def value(step):
        moved = jax.tree.map(lambda leaf, d: leaf + step * d, block, direction)
        return jnp.sum(model.block(moved, x, layer_type=3) * probe)

    slope = jax.grad(value)(0.0)
    assert float(slope) == pytest.approx(float((value(1e-3) - value(-1e-3)) / 2e-3), rel=1e-2)


@pytest.mark.nans
def test_a_token_past_the_vocabulary_is_nan_not_its_neighbour():
    model, params = build(WINDOWED), random_params(WINDOWED)
    x = model.embed(params, np.array([[23, 24]]), dtype=jnp.float32)
    assert np.isfinite(x[0, 0]).all()
    assert np.isnan(x[0, 1]).all()


def test_a_kind_of_another_family_is_refused():
    model, params = build(WINDOWED), random_params(WINDOWED)
    with pytest.raises(InputError, match="layer type 'full'"):
        model.block(trees.subtree(params, "model/layers/0"), jnp.zeros((1, 2, 12)), layer_type="full")


def test_missing_parameters_are_named():
    params = random_params(WINDOWED)
    del params["model"]["layers"]["1"]
    with pytest.raises(InputError, match="model/layers/1"):
        forward(params, random_tokens(WINDOWED, (1, 3)), WINDOWED)
