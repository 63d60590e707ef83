"""Codebooks in 16 bits: in float16 where that keeps the codes, in bfloat16 beyond its range on either side."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluscomp_jax
from cluscomp_jax import llama
from cluscomp_jax.clustering.matrix import cluster_matrix
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, round_codebook
from cluscomp_jax.models.model import build_model, parameter_shapes
from cluscomp_jax.models.source import DictSource
from cluscomp_jax.runtime.reporter import SilentReporter
from cluscomp_jax.training import round_masters, split_params

BLIND = ClusterConfig(iterations=5, error_feedback=False, weighted=False)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(-12, 6))
def test_the_dtype_that_loses_less_is_taken(seed, magnitude):
    codes = (np.random.default_rng(seed).normal(size=(16, 4)) * 10.0**magnitude).astype(np.float32)

    def lost(dtype):
        with np.errstate(over="ignore"):
            return np.sum(np.square((codes.astype(dtype).astype(np.float64) - codes) / np.abs(codes).max()))

    rounded = round_codebook(jnp.asarray(codes), "float16")
    narrow, wide = lost(np.float16), lost(ml_dtypes.bfloat16)
    # Where both lose the same within float32's rounding of these sums, either is right.
    if not np.isclose(narrow, wide, rtol=1e-4):
        assert rounded.dtype == ("float16" if narrow < wide else "bfloat16")
    assert round_codebook(jnp.asarray(codes), "bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("rms", [2e-2, 2e-5, 2e-7, 2e-8, 2e-12])
def test_the_error_of_a_matrix_does_not_depend_on_its_scale(rms):
    weight = np.random.default_rng(0).standard_t(8, (64, 128)).astype(np.float32)
    rule, key = CompressionRule(group_size=4, num_codes=256), jax.random.key(0)
    _, expected = cluster_matrix(weight, rule, BLIND, key=key)
    array, found = cluster_matrix(weight * np.float32(rms), rule, BLIND, key=key)
    # bfloat16 rounds a code by at most 2^-9 of it, which adds 2^-18 / 3 of the energy: nothing next to the error.
    assert found.relative_error == pytest.approx(expected.relative_error, rel=0.01)
    assert array.dtype == ("float16" if rms > 1e-5 else "bfloat16")


def test_codes_of_zero_and_codes_that_are_not_finite_in_float16():
    assert round_codebook(jnp.zeros((3, 2)), "float16").dtype == "float16"
    assert round_codebook(jnp.array([[1.0, 7e4]]), "float16").dtype == "bfloat16"


class Warnings(SilentReporter):
    def __init__(self):
        self.texts = []

    def warn(self, text):
        self.texts.append(text)


CONFIG = llama.LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def tiny_params(scales):
    rng = np.random.default_rng(0)
    flat = {p: rng.normal(0, 0.3, s).astype(np.float32) for p, s in parameter_shapes(build_model(CONFIG)).items()}
    return trees.unflatten({path: leaf * np.float32(scales.get(path, 1.0)) for path, leaf in flat.items()})


def test_a_run_says_which_matrix_is_kept_in_another_dtype():
    small, reporter = "model/layers/1/mlp/up_proj/kernel", Warnings()
    cfg = CompressConfig(
        model=CONFIG, cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=8),), iterations=1)
    )
    compressed = cluscomp_jax.compress(tiny_params({small: 1e-7}), cfg, reporter=reporter)
    (text,) = reporter.texts
    assert text.startswith(f"{small}: kept in bfloat16; its codes are beyond float16")
    kept = {path: leaf.dtype for path, leaf in trees.flatten(compressed).items() if isinstance(leaf, CodebookArray)}
    assert [path for path, dtype in kept.items() if dtype == "bfloat16"] == [small]


def test_masters_of_stacked_blocks_move_to_what_is_stored_matrix_by_matrix():
    params = tiny_params({"model/layers/1/mlp/up_proj/kernel": 1e-7})
    half = trees.map_by_path(lambda _, leaf: leaf.astype(np.float16), params)
    model = build_model(CONFIG)
    trained, _, layout = split_params(DictSource(half, model), model, (".*up_proj/kernel",))
    exact = np.stack([params["model"]["layers"][str(i)]["mlp"]["up_proj"]["kernel"] for i in range(2)])
    (group,) = trained
    moved = round_masters({group: {"mlp": {"up_proj": {"kernel": jnp.asarray(exact)}}}}, layout=layout)
    found = np.asarray(moved[group]["mlp"]["up_proj"]["kernel"])
    for ours, kernel in zip(found, exact, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(round_codebook(jnp.asarray(kernel), "float16"), np.float32))
    np.testing.assert_array_equal(found[1], exact[1].astype(ml_dtypes.bfloat16).astype(np.float32))
