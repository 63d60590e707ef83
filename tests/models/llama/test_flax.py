"""The linen and nnx adapters: the same logits as `forward`, dense and compressed, and the same parameter paths."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.coding import index_dtype, index_shape
from cluscomp_jax.errors import InputError
from cluscomp_jax.integrations.linen import apply
from cluscomp_jax.models.llama import LlamaConfig, build, forward, init_params
from cluscomp_jax.models.llama.linen import FlaxLlama
from cluscomp_jax.models.llama.nnx import NnxLlama
from cluscomp_jax.models.source import DictSource

CONFIG = LlamaConfig(
    model_type="qwen2",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=22,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.2,
)
PARAMS = init_params(CONFIG, jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9))


def compress_by_hand(params, seed=0):
    """Replaces every block kernel by a random codebook and index, both axes in turn, some groups not dividing."""
    rng = np.random.default_rng(seed)

    def replace(path, leaf):
        if not path.endswith("kernel") or path.startswith("lm_head"):
            return leaf
        axis = "out" if "mlp" in path else "in"
        codes, g = (300, 3) if "gate" in path else (20, 4)
        index = rng.integers(0, codes, index_shape(leaf.shape, g, axis)).astype(index_dtype(codes))
        codebook = rng.normal(0, 0.2, (codes, g)).astype(np.float32)
        return CodebookArray(jnp.asarray(codebook), jnp.asarray(index), leaf.shape, axis)

    return trees.map_by_path(replace, params)


def decompress_by_hand(params):
    return trees.map_by_path(lambda _, leaf: decode(leaf) if isinstance(leaf, CodebookArray) else leaf, params)


COMPRESSED = compress_by_hand(PARAMS)
DENSE_TWIN = decompress_by_hand(COMPRESSED)


def test_forward_of_compressed_equals_forward_of_decoded():
    actual, expected = forward(COMPRESSED, TOKENS, CONFIG), forward(DENSE_TWIN, TOKENS, CONFIG)
    chex.assert_trees_all_close(actual, expected, atol=1e-5)
    assert np.abs(expected - forward(PARAMS, TOKENS, CONFIG)).max() > 0.1


def test_linen_init_has_exactly_our_tree():
    params = FlaxLlama(CONFIG).init(jax.random.key(1), TOKENS)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    kernels = [leaf for path, leaf in trees.flatten(params).items() if path.endswith("q_proj/kernel")]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("params", [PARAMS, COMPRESSED], ids=["dense", "compressed"])
def test_linen_apply_equals_forward(params):
    module = FlaxLlama(CONFIG)
    actual = jax.jit(lambda params: module.apply({"params": params}, TOKENS))(params)
    chex.assert_trees_all_close(actual, forward(params, TOKENS, CONFIG), atol=1e-5)


class ForeignDecoder(linen.Module):
    """A linen model that knows nothing of this package."""

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(32, 16, name="embed")(tokens)
        x = x + linen.Dense(16, name="mix", dtype=jnp.float32)(linen.silu(linen.Dense(24, name="widen")(x)))
        return linen.Dense(32, use_bias=False, name="head")(x)


def test_linen_apply_serves_an_existing_linen_model():
    module = ForeignDecoder()
    params = module.init(jax.random.key(2), TOKENS)["params"]
    params["widen"]["bias"] = jnp.arange(24.0)
    compressed = compress_by_hand(params)
    actual = jax.jit(lambda p: apply(module, {"params": p}, TOKENS))(compressed)
    expected = module.apply({"params": decompress_by_hand(compressed)}, TOKENS)
    chex.assert_trees_all_close(actual, expected, atol=1e-4)
    chex.assert_trees_all_equal(apply(module, {"params": params}, TOKENS), module.apply({"params": params}, TOKENS))


def test_without_the_interceptor_linen_refuses():
    module = ForeignDecoder()
    compressed = compress_by_hand(module.init(jax.random.key(2), TOKENS)["params"])
    with pytest.raises(Exception, match="kernel"):
        module.apply({"params": compressed}, TOKENS)


@pytest.mark.parametrize("params", [PARAMS, COMPRESSED], ids=["dense", "compressed"])
def test_nnx_equals_forward_and_its_pure_dict_is_a_params_tree(params):
    module = NnxLlama(CONFIG, params)
    expected = forward(params, TOKENS, CONFIG)
    chex.assert_trees_all_close(module(TOKENS), expected, atol=1e-5)
    chex.assert_trees_all_close(nnx.jit(lambda m, t: m(t))(module, TOKENS), expected, atol=1e-5)

    pure = nnx.to_pure_dict(nnx.state(module))
    assert list(pure["model"]["layers"]) == [0, 1]
    assert trees.flatten(pure).keys() == trees.flatten(params).keys()
    chex.assert_trees_all_equal(forward(pure, TOKENS, CONFIG), expected)
    source = DictSource(pure, build(CONFIG))
    chex.assert_trees_all_equal(source.load_block(1), trees.subtree(params, "model/layers/1"))
    chex.assert_trees_all_equal(NnxLlama(CONFIG, pure)(TOKENS), expected)


def test_nnx_refuses_params_of_another_model():
    with pytest.raises(InputError, match="lm_head/kernel is missing"):
        NnxLlama(CONFIG, {"model": PARAMS["model"]})
    with pytest.raises(InputError, match="extra/kernel is not part"):
        NnxLlama(CONFIG, {**PARAMS, "extra": {"kernel": np.zeros((2, 2))}})
