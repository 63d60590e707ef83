"""What is no tree of parameters that compress takes is named in one line, with what to do."""

import dataclasses

import host_trees
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_llamas import SMALL, random_params, random_tokens

from cluscomp_jax import layouts, llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.pipeline import compress

CONFIG = llama.LlamaConfig(**SMALL)
PARAMS = random_params(CONFIG)
RULE = CompressionRule(group_size=3, num_codes=10)
RUN = CompressConfig(model=CONFIG, cluster=ClusterConfig(rules=(RULE,)), tuning=None)


@dataclasses.dataclass
class Weights:
    kernel: np.ndarray


class LinenLike:
    def init(self, key, x):
        """Returns parameters."""

    def apply(self, variables, x):
        """Returns logits."""


def message_of(params, cfg=RUN, **options):
    with pytest.raises(InputError) as error:
        compress(params, cfg, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def changed(make, config=CONFIG, **changes):
    """Returns the flat state dict with some arrays replaced, or taken out by None."""
    tree = make(random_params(config), config) | changes
    return {name: leaf for name, leaf in tree.items() if leaf is not None}


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"params": {"encoder": {"w": np.ones((2, 3))}}}, ("params/encoder/w [2, 3]", "by compress_blocks or")),
        ({}, ("holds no arrays",)),
        ([np.ones(3)], ("a list of 1", "v.path")),
        (LinenLike(), ("is a module", "LinenLike", 'module.init(...)["params"]')),
        (Weights(np.ones((2, 2))), ("Weights, a dataclass that JAX does not know", "register_dataclass")),
        ("models/llama", ("is the text 'models/llama'", "open_model")),
        (3, ("params is a builtins.int", "give a tree of arrays")),
    ],
)  # fmt: skip
def test_what_is_no_known_tree_is_named(params, parts):
    text = message_of(params)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("make", [host_trees.tunix, host_trees.maxtext_scanned, host_trees.linen_lists])
def test_shapes_without_numbers_are_refused(make):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), make(PARAMS, CONFIG))
    assert "is a ShapeDtypeStruct without numbers; load the parameters first" in message_of(shapes)


def test_unknown_names_without_numbers_are_refused_as_such():
    shapes = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    assert "'w' is a ShapeDtypeStruct without numbers" in message_of(shapes)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (host_trees.tunix, "parameters of tunix: 2 blocks"),
        (host_trees.maxtext_scanned, "has 2 blocks along axis 1"),
        (host_trees.stacked_names, "has 2 blocks along axis 0"),
    ],
)
def test_the_number_of_blocks_is_that_of_the_arrays(make, where):
    cfg = dataclasses.replace(RUN, model=dataclasses.replace(CONFIG, num_hidden_layers=3, layer_types=()))
    text = message_of(make(PARAMS, CONFIG), cfg)
    assert where in text
    assert "the model config says 3" in text


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "none is 'model/layers/1/mlp/up_proj/kernel'"),
        ({Q: np.zeros((12, 24))}, "has shape (12, 24); the model config says (24, 12); is it [out, in]?"),
        ({Q: np.full((24, 12), np.nan)}, f"{Q!r} holds NaN or Inf"),
        ({Q: np.zeros((24, 12), np.int8)}, "multiply quantised weights by their scale first"),
        ({Q: "a name"}, f"{Q!r} is a str; give arrays"),
        ({"model.layers.0.self_attn.q_proj.bias": np.zeros(24)}, "the model has no"),
        ({"model.layers.0.self_attn.lora_a": np.zeros((2, 2))}, "is no parameter of a llama"),
        ({"model.embed_tokens.embedding": None, "embed_tokens.weight": np.zeros((24, 12))}, "are both"),
    ],
)
@pytest.mark.nans
def test_arrays_that_do_not_fit_are_named_by_the_hosts_path(changes, part):
    text = message_of(changed(host_trees.state_dict, **changes))
    assert part in text, text


def test_what_carries_no_parameter_stays():
    """Rotary frequencies, counters, and the head of a model whose embeddings are tied."""
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32), "step": np.int32(3)}
    tree = changed(host_trees.state_dict, **extra)
    got = compress(tree, dataclasses.replace(RUN, model=tied))
    assert all(got[name] is tree[name] for name in (*extra, "lm_head.weight"))


def test_a_compressed_tree_is_not_compressed_again():
    got = compress(host_trees.tunix(PARAMS, CONFIG), RUN)
    assert "is compressed already" in message_of(got)


def test_stacked_blocks_need_equal_rules():
    tree = host_trees.stacked_names(PARAMS, CONFIG)
    first = CompressionRule(pattern=r"model/layers/0/.*kernel", group_size=2, num_codes=10)
    cfg = dataclasses.replace(RUN, cluster=ClusterConfig(rules=(first, RULE)))
    text = message_of(tree, cfg)
    assert "not the same in blocks 0 and 1" in text
    compress(host_trees.linen_lists(PARAMS, CONFIG), cfg)


def test_bits_by_sensitivity_need_blocks_of_their_own():
    tree, tokens = host_trees.stacked_names(PARAMS, CONFIG), random_tokens(CONFIG, (2, 8))
    cluster = ClusterConfig(rules=(CompressionRule(),), bits=4.0, mixed_precision="per_matrix")
    text = message_of(tree, dataclasses.replace(RUN, cluster=cluster), calibration=tokens)
    assert "cluster.mixed_precision" in text


def test_only_the_layouts_that_are_given_are_tried():
    text = message_of(host_trees.tunix(PARAMS, CONFIG), layout=layouts.maxtext)
    assert "known: ours, MaxText with scanned layers, MaxText;" in text


def test_params_below_a_name_are_found():
    got = compress({"params": PARAMS}, RUN)
    expected = trees.flatten(compress(PARAMS, RUN))
    for path, leaf in trees.flatten(got["params"]).items():
        np.testing.assert_array_equal(jax.tree.leaves(leaf)[-1], jax.tree.leaves(expected[path])[-1])


class TransformersConfig:
    model_type = "llama"


@pytest.mark.parametrize("model", [TransformersConfig(), {"model_type": "llama"}, object()])
def test_a_config_of_another_library_is_named(model):
    assert "LlamaConfig.of(it)" in message_of(PARAMS, dataclasses.replace(RUN, model=model))


@pytest.mark.parametrize(
    ("calibration", "part"),
    [
        ("a text", "calibration is text"),
        (["one", "two"], "calibration is text"),
        ([[1, 2, 3], [1, 2]], "samples of 2 to 3 tokens"),
    ],
)
def test_calibration_that_is_no_array_of_tokens_is_named(calibration, part):
    assert part in message_of(PARAMS, calibration=calibration)


def test_calibration_may_be_a_list_of_lists():
    cfg = dataclasses.replace(RUN, cluster=dataclasses.replace(RUN.cluster, refine_rounds=0))
    tokens = random_tokens(CONFIG, (2, 8))
    got, expected = (compress(PARAMS, cfg, calibration=given) for given in (tokens.tolist(), tokens))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
