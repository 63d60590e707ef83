"""check= compares our forward pass with the host's and finds what names and shapes do not show."""

import dataclasses

import host_trees
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_llamas import random_params

from cluscomp_jax import llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.pipeline import compress

SQUARE = llama.LlamaConfig(
    vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
RULES = ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=12),), iterations=3)
PARAMS = random_params(SQUARE)


def run_of(config):
    return CompressConfig(model=config, cluster=RULES, tuning=None)


def host_forward(config=SQUARE):
    """The host's pass over its own tree: the parameters that it was made of."""
    return lambda _, tokens: llama.forward(PARAMS, tokens, config)


def test_the_right_tree_passes_and_is_compressed():
    got = compress(host_trees.tunix(PARAMS, SQUARE), run_of(SQUARE), check=host_forward())
    assert isinstance(got["layers"][0]["attn"]["q_proj"]["w"], CodebookArray)


def test_a_transposed_square_kernel_is_found():
    """Names say [in, out], all kernels of attention are square and [out, in]: nothing else would show it."""
    tree = host_trees.linen_lists(PARAMS, SQUARE)
    for i in range(2):
        attention = tree["params"][f"layers_{i}"]["self_attn"]
        for name in attention:
            attention[name]["kernel"] = np.ascontiguousarray(attention[name]["kernel"].T)
    compress(tree, run_of(SQUARE))
    with pytest.raises(InputError, match=r"logits differ by up to [\d.]+, the largest is [\d.]+.*transposed"):
        compress(tree, run_of(SQUARE), check=host_forward())


OTHER = {
    "rope": {"rope": RopeConfig(theta=100.0)},
    "epsilon": {"rms_norm_eps": 0.1},
    "activation": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_another_computation_of_the_host_is_found(change):
    host = dataclasses.replace(SQUARE, **change)
    with pytest.raises(InputError, match="logits differ"):
        compress(host_trees.tunix(PARAMS, SQUARE), run_of(SQUARE), check=host_forward(host))


def test_a_missing_scale_is_found():
    """A tree with the names of MaxText whose q is not divided by sqrt(head_dim)."""
    tree = host_trees.maxtext(PARAMS, dataclasses.replace(SQUARE, model_type="qwen2"))
    with pytest.raises(InputError, match="in the layout of MaxText"):
        compress(tree, run_of(SQUARE), check=host_forward())


def test_bfloat16_allows_its_own_rounding():
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    tree = host_trees.tunix(jax.tree.map(lambda leaf: np.asarray(leaf), narrow), SQUARE)
    compress(tree, run_of(SQUARE), check=lambda _, tokens: llama.forward(narrow, tokens, SQUARE, dtype=jnp.bfloat16))


def test_our_own_layout_can_be_checked_too():
    compress(PARAMS, run_of(SQUARE), check=lambda params, tokens: llama.forward(params, tokens, SQUARE))
    with pytest.raises(InputError, match="logits differ"):
        compress(PARAMS, run_of(SQUARE), check=lambda params, tokens: 2 * llama.forward(params, tokens, SQUARE))


@pytest.mark.parametrize(
    ("result", "part"),
    [(np.zeros((2, 16, 7)), "an array of shape (2, 16, 7)"), ((np.zeros(3),), "check returned a tuple")],
)
def test_what_is_no_logits_is_named(result, part):
    with pytest.raises(InputError) as error:
        compress(PARAMS, run_of(SQUARE), check=lambda *_: result)
    assert part in str(error.value)
    assert "(2, 16, 24)" in str(error.value)


def test_logits_that_are_not_finite_are_refused():
    bad = trees.unflatten(trees.flatten(PARAMS))

    def check(_, tokens):
        return np.full((*tokens.shape, 24), np.nan, np.float32)

    with pytest.raises(InputError, match="logits differ by up to nan"):
        compress(bad, run_of(SQUARE), check=check)
