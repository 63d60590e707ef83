"""compress takes the tree of another codebase and gives it back with CodebookArrays in place of its kernels."""

import dataclasses

import chex
import host_trees
import jax
import numpy as np
import pytest
from small_llamas import SMALL, random_params, random_tokens

import cluscomp_jax
from cluscomp_jax import layouts, llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import pytrees, trees
from cluscomp_jax.core.codebook import CodebookArray, decode, validate
from cluscomp_jax.models.layers.rope import RopeConfig
from cluscomp_jax.models.model import build_model

LLAMA = llama.LlamaConfig(**SMALL)
LLAMA31 = dataclasses.replace(
    LLAMA,
    rope=RopeConfig(rope_type="llama3", theta=500.0, factor=8.0, original_max_positions=8192, high_freq_factor=4.0),
)
QWEN2 = llama.LlamaConfig(model_type="qwen2", **SMALL)
QWEN3 = llama.LlamaConfig(model_type="qwen3", **SMALL)
MISTRAL = llama.LlamaConfig(model_type="mistral", **SMALL)
CASES = {
    "linen lists": (host_trees.linen_lists, LLAMA),
    "linen lists of Qwen 3": (host_trees.linen_lists, QWEN3),
    "integer keys": (host_trees.integer_keys, QWEN2),
    "EasyDeL": (host_trees.easydel, LLAMA),
    "stacked names": (host_trees.stacked_names, QWEN2),
    "state dict": (host_trees.state_dict, QWEN2),
    "state dict of Mistral": (host_trees.state_dict, MISTRAL),
    "tunix Llama": (host_trees.tunix, LLAMA),
    "tunix Qwen 2": (host_trees.tunix, QWEN2),
    "tunix Qwen 3": (host_trees.tunix, QWEN3),
    "bonsai": (host_trees.bonsai, QWEN3),
    "keras-hub Llama": (host_trees.keras_hub, LLAMA),
    "keras-hub Qwen": (host_trees.keras_hub, QWEN2),
    "keras-hub Qwen 3": (host_trees.keras_hub, QWEN3),
    "MaxText Qwen 3": (host_trees.maxtext, QWEN3),
    "MaxText scanned Qwen 2": (host_trees.maxtext_scanned, QWEN2),
    "MaxText scanned Qwen 3": (host_trees.maxtext_scanned, QWEN3),
    "MaxText Llama": (host_trees.maxtext, LLAMA),
    "MaxText scanned Llama 3.1": (host_trees.maxtext_scanned, LLAMA31),
    "MaxText Llama 3.1": (host_trees.maxtext, LLAMA31),
}
OWN_ORDER = {"MaxText Llama", "MaxText scanned Llama 3.1", "MaxText Llama 3.1"}
"""Where kernels of q or k are others than in the FlaxLlama tree."""
CALIBRATED = {"stacked names", "state dict", "tunix Qwen 3", "keras-hub Qwen", *OWN_ORDER} - {"MaxText Llama 3.1"}
"""One of each way of converting."""


def run_of(config, **settings):
    cluster = ClusterConfig(rules=(CompressionRule(group_size=3, num_codes=10),), iterations=3)
    return CompressConfig(
        model=config,
        cluster=dataclasses.replace(cluster, **settings.pop("cluster", {})),
        calibration=CalibrationConfig(samples=2, length=8),
        tuning=BlockTuningConfig(epochs=1, learning_rate=0.01),
        **settings,
    )


def layout_of(case):
    """Our own names with integer keys are another layout only where it is asked for."""
    return layouts.flax if case == "integer keys" else layouts.auto


@pytest.mark.parametrize("case", CASES)
def test_a_tree_is_read_as_the_parameters_it_was_made_of(case):
    make, config = CASES[case]
    params = random_params(config)
    opened = layouts.open_tree(make(params, config), build_model(config))
    flat = trees.flatten(opened.source.load_outer())
    for i in range(config.num_hidden_layers):
        block = trees.flatten(opened.source.load_block(i))
        flat |= {f"model/layers/{i}/{path}": leaf for path, leaf in block.items()}
    expected = trees.flatten(params)
    assert flat.keys() == expected.keys()
    for path, leaf in flat.items():
        if case not in OWN_ORDER or not path.endswith(("q_proj/kernel", "k_proj/kernel")):
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
        assert leaf.shape == expected[path].shape


@pytest.mark.parametrize("case", CASES)
def test_the_forward_of_a_tree_is_that_of_its_parameters(case):
    """Order and scale of MaxText's q and k are accounted for in the forward pass."""
    make, config = CASES[case]
    params = random_params(config)
    layouts.check_forward(
        make(params, config),
        layouts.open_tree(make(params, config), build_model(config)),
        lambda _, tokens: llama.forward(params, tokens, config),
    )


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_same_parameters_in_our_layout(case):
    make, config = CASES[case]
    params = random_params(config)
    tree = make(params, config)
    got = cluscomp_jax.compress(tree, run_of(config), layout=layout_of(case))
    assert jax.tree.structure(got, is_leaf=pytrees.is_codebook_array) == jax.tree.structure(tree)
    expected = trees.flatten(cluscomp_jax.compress(params, run_of(config)))
    opened = layouts.open_tree(tree, build_model(config), layout_of(case))
    roles = opened.source.roles
    before, count = dict(pytrees.iterate(tree)), 0
    for path, leaf in pytrees.iterate(got):
        if not isinstance(leaf, CodebookArray):
            assert leaf is before[path]
            continue
        count += 1
        validate(leaf, path)
        assert (leaf.shape, leaf.dtype) == (before[path].shape, before[path].dtype)
        if case in OWN_ORDER and roles[path].path in ("self_attn/q_proj/kernel", "self_attn/k_proj/kernel"):
            continue
        arrays = leaf.stacked_in_front()
        blocks = range(2) if leaf.stack else [roles[path].block]
        for i in blocks:
            array = expected[f"model/layers/{i}/{roles[path].path}"]
            one = arrays[i] if leaf.stack else arrays
            np.testing.assert_array_equal(one.codebook, array.codebook)
            np.testing.assert_array_equal(one.index, array.index)
    assert count == (7 if opened.stacked else 14)


@pytest.mark.parametrize("case", sorted(CALIBRATED))
def test_a_calibrated_and_tuned_tree_decodes_to_what_our_layout_gives(case):
    """Hessians, tuning and norms go the whole way; the dense tree is converted back by hand or read again, and run."""
    make, config = CASES[case]
    params, tokens = random_params(config), random_tokens(config, (2, 8))
    tree = make(params, config)
    got = cluscomp_jax.compress(tree, run_of(config), calibration=tokens)
    dense = cluscomp_jax.decompress(got)
    before, after = dict(pytrees.iterate(tree)), dict(pytrees.iterate(dense))
    for path, leaf in after.items():
        assert (leaf.shape, leaf.dtype) == (before[path].shape, before[path].dtype), path
    changed = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    assert any("norm" in path for path in changed)
    if case in OWN_ORDER:
        reference = host_trees.from_maxtext(dense, config)
    else:
        reference = cluscomp_jax.compress(params, run_of(config), calibration=tokens)
    layouts.check_forward(
        dense,
        layouts.open_tree(dense, build_model(config)),
        lambda _, tokens: llama.forward(reference, tokens, config),
    )


@pytest.mark.parametrize("case", sorted(OWN_ORDER))
def test_the_way_back_of_the_oracle_is_one(case):
    make, config = CASES[case]
    params = random_params(config)
    chex.assert_trees_all_close(host_trees.from_maxtext(make(params, config), config), params, rtol=1e-6)


def test_shared_codebooks_name_their_owner_in_the_hosts_block():
    params = random_params(LLAMA)
    cfg = run_of(LLAMA, cluster={"tie_codebooks": "input"})
    got = cluscomp_jax.compress(host_trees.tunix(params, LLAMA), cfg)
    attn = got["layers"][1]["attn"]
    assert {name: attn[f"{name}_proj"]["w"].tied_to for name in "qkvo"} == {
        "q": None, "k": "attn/q_proj/w", "v": "attn/q_proj/w", "o": None,
    }  # fmt: skip
    trained, frozen = cluscomp_jax.partition(got)
    chex.assert_trees_all_equal(
        decode(cluscomp_jax.combine(trained, frozen)["layers"][1]["attn"]["k_proj"]["w"]), decode(attn["k_proj"]["w"])
    )


def test_arrays_stay_with_those_of_the_host_and_norms_keep_their_dtype():
    params = jax.tree.map(
        lambda leaf: jax.numpy.asarray(leaf, jax.numpy.bfloat16), host_trees.tunix(random_params(LLAMA), LLAMA)
    )
    got = cluscomp_jax.compress(params, run_of(LLAMA), calibration=random_tokens(LLAMA, (2, 8)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    layer = got["layers"][0]
    assert layer["input_layernorm"]["w"].dtype == jax.numpy.bfloat16
    assert layer["attn"]["q_proj"]["w"].dtype == jax.numpy.bfloat16


def test_boxes_and_scan_are_kept():
    """MaxText's params are boxed; a scanned kernel is decoded block by block."""
    nn = pytest.importorskip("flax.linen")
    params = random_params(LLAMA31)
    tree = host_trees.maxtext_scanned(params, LLAMA31)
    boxed = jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, ("a",) * leaf.ndim), tree)
    got = cluscomp_jax.compress(boxed, run_of(LLAMA31))
    query = got["params"]["decoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert isinstance(query, nn.LogicallyPartitioned)
    plain = cluscomp_jax.compress(tree, run_of(LLAMA31))
    chex.assert_trees_all_equal(jax.tree.leaves(got), jax.tree.leaves(plain))
    assert query.value.shape == (12, 2, 4, 6)


def test_an_nnx_module_and_its_state_are_taken():
    nnx = pytest.importorskip("flax.nnx")
    from cluscomp_jax.models.llama.nnx import NnxLlama

    params = random_params(LLAMA)
    module = NnxLlama(LLAMA, params)
    expected = trees.flatten(cluscomp_jax.compress(params, run_of(LLAMA)))
    for given in (nnx.state(module), module):
        got = cluscomp_jax.compress(given, run_of(LLAMA))
        assert type(got) is type(given)
        for path, leaf in pytrees.iterate(got):
            if isinstance(leaf, CodebookArray):
                np.testing.assert_array_equal(leaf.index, expected[path].index)
    tokens = random_tokens(LLAMA, (1, 5))
    np.testing.assert_allclose(got(tokens), llama.forward(trees.unflatten(expected), tokens, LLAMA), atol=1e-4)


def test_a_layout_of_ones_own_is_a_table():
    mine = dataclasses.replace(
        layouts.flax[0],
        name="mine",
        blocks=r"h/(\d+)",
        outer={**layouts.flax[0].outer, "lm_head/kernel": ("head/w", "i o -> | i | o")},
    )
    params = random_params(LLAMA)
    tree = host_trees.integer_keys(params, LLAMA)
    mine_tree = {
        "embed_tokens": tree["model"]["embed_tokens"],
        "norm": tree["model"]["norm"],
        "h": tree["model"]["layers"],
        "head": {"w": tree["lm_head"]["kernel"]},
    }
    got = cluscomp_jax.compress(mine_tree, run_of(LLAMA), layout=mine)
    assert isinstance(got["h"][0]["mlp"]["up_proj"]["kernel"], CodebookArray)
