"""Dense kernel to CodebookArray and back, against an element-by-element oracle."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import cluscomp_jax
from cluscomp_jax.clustering import matrix
from cluscomp_jax.clustering.error_feedback import factor_hessian
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.core.codebook import CodebookArray, decode, validate
from cluscomp_jax.errors import InputError

EXACT = ClusterConfig(iterations=2, codebook_dtype="float16")


def decoded_by_hand(w):
    """The definition of CodebookArray, one weight at a time."""
    d_in, d_out = w.shape
    codebook, index = np.asarray(w.codebook), np.asarray(w.index)
    g = codebook.shape[1]
    out = np.zeros((d_in, d_out), codebook.dtype)
    for i in range(d_in):
        for o in range(d_out):
            out[i, o] = codebook[index[i, o // g], o % g] if w.axis == "out" else codebook[index[i // g, o], i % g]
    return out


def random_array(rng, shape, g, n, axis):
    d_in, d_out = shape
    pieces = (d_in, -(-d_out // g)) if axis == "out" else (-(-d_in // g), d_out)
    index = rng.integers(0, n, pieces).astype(np.uint8 if n <= 256 else np.uint16)
    return CodebookArray(jnp.asarray(rng.standard_normal((n, g)), jnp.float32), jnp.asarray(index), shape, axis)


@given(
    d_in=st.integers(1, 13), d_out=st.integers(1, 13), g=st.integers(1, 9), n=st.sampled_from([1, 5, 256, 257]),
    axis=st.sampled_from(["out", "in"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40)
def test_decode_is_its_definition(d_in, d_out, g, n, axis, seed):
    w = validate(random_array(np.random.default_rng(seed), (d_in, d_out), g, n, axis))
    assert decode(w).shape == w.shape
    np.testing.assert_array_equal(decode(w), decoded_by_hand(w))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("shape", "g"), [((8, 12), 4), ((7, 13), 4), ((10, 9), 5), ((3, 5), 9), ((6, 6), 1)])
def test_a_matrix_with_few_vectors_is_repeated_exactly(shape, g, axis):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float16).astype(np.float32)
    rule = CompressionRule(group_size=g, num_codes=300, axis=axis)
    w, stats = matrix.cluster_matrix(weight, rule, EXACT, key=jax.random.key(0))
    np.testing.assert_array_equal(decode(w).astype(jnp.float32), weight)
    assert validate(w).axis == axis
    assert stats.relative_error == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_returned_is_already_sixteen_bit_and_its_error_is_that_of_the_result(dtype):
    weight = np.random.default_rng(1).standard_normal((40, 48)).astype(np.float32)
    settings_ = ClusterConfig(iterations=5, codebook_dtype=dtype)
    mass = np.random.default_rng(2).exponential(1.0, 40).astype(np.float32)
    w, stats = matrix.cluster_matrix(
        weight, CompressionRule(group_size=4, num_codes=50), settings_, key=jax.random.key(0), channel_weights=mass
    )
    assert w.codebook.dtype == jnp.dtype(dtype)
    assert w.index.dtype == jnp.uint8
    error = (weight - decoded_by_hand(w).astype(np.float64)) ** 2
    np.testing.assert_allclose(stats.relative_error, error.sum() / (weight.astype(np.float64) ** 2).sum(), rtol=1e-4)
    weighted = (error * mass[:, None]).sum() / (weight.astype(np.float64) ** 2 * mass[:, None]).sum()
    np.testing.assert_allclose(stats.weighted_error, weighted, rtol=1e-4)


def test_activation_weights_lower_the_weighted_error():
    rng = np.random.default_rng(3)
    weight, mass = (
        rng.standard_normal((64, 64)).astype(np.float32),
        np.exp(2 * rng.standard_normal(64)).astype(np.float32),
    )
    rule = CompressionRule(group_size=4, num_codes=64)
    plain, _ = matrix.cluster_matrix(weight, rule, EXACT, key=jax.random.key(0))
    weighted, _ = matrix.cluster_matrix(weight, rule, EXACT, key=jax.random.key(0), channel_weights=mass)
    assert matrix.relative_errors(weight, weighted, mass)[1] < 0.9 * matrix.relative_errors(weight, plain, mass)[1]


def test_output_weights_lower_the_weighted_error_of_a_trellis_and_leave_plain_codes():
    rng = np.random.default_rng(5)
    weight, mass = rng.standard_normal((48, 95)).astype(np.float32), np.exp(rng.standard_normal(95)).astype(np.float32)
    inputs = rng.standard_normal((200, 48)) @ rng.standard_normal((48, 48))
    hessian = (inputs.T @ inputs / 200).astype(np.float32)
    factor = factor_hessian(jnp.asarray(hessian))

    def error(rule, **given):
        kept, _ = matrix.cluster_matrix(weight, rule, EXACT, key=jax.random.key(0), factor=factor, **given)
        missing = weight - np.asarray(decode(kept), np.float64)
        return np.einsum("io,ij,jo->", missing * mass, hessian, missing), kept

    trellis = CompressionRule(group_size=2, num_codes=64, step_bits=3)
    assert error(trellis, output_weights=mass)[0] < 0.95 * error(trellis)[0]
    plain = CompressionRule(group_size=4, num_codes=16)
    chex.assert_trees_all_equal(error(plain, output_weights=mass)[1], error(plain)[1])


def test_dead_channels_do_no_harm():
    weight = np.random.default_rng(4).standard_normal((16, 16)).astype(np.float32)
    for mass in (np.zeros(16, np.float32), np.r_[np.zeros(8), np.ones(8)].astype(np.float32)):
        w, stats = matrix.cluster_matrix(
            weight, CompressionRule(group_size=4, num_codes=8), EXACT, key=jax.random.key(0), channel_weights=mass
        )
        chex.assert_tree_all_finite((w.codebook, stats.relative_error, stats.weighted_error))


@pytest.mark.parametrize("weights", ["channel_weights", "output_weights"])
def test_axis_in_refuses_weights_with_the_reason(weights):
    with pytest.raises(InputError, match=r"axis 'in'.*weighted = false"):
        matrix.cluster_matrix(
            np.ones((4, 4), np.float32), CompressionRule(group_size=2, num_codes=2, axis="in"), EXACT,
            key=jax.random.key(0), **{weights: np.ones(4, np.float32)},
        )  # fmt: skip


def test_a_matrix_too_large_for_float16_is_kept_in_bfloat16():
    weight = np.full((4, 4), 1e5, np.float32)
    w, _ = matrix.cluster_matrix(weight, CompressionRule(group_size=2, num_codes=2), EXACT, key=jax.random.key(0))
    assert w.codebook.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(decode(w), np.float32), 1e5, rtol=1e-2)


def test_size_report_counts_packed_indices_sixteen_bit_codebooks_and_dense_bytes():
    rng = np.random.default_rng(5)
    params = {
        "a": {"kernel": random_array(rng, (10, 13), 4, 300, "out")},
        "b": {"kernel": random_array(rng, (10, 13), 4, 1, "in")},
        "c": {"bias": np.zeros(7, np.float32)},
    }
    report = cluscomp_jax.size_report(params)
    by_path = {matrix.path: matrix for matrix in report.matrices}
    assert by_path["a/kernel"].bits == 9 * 10 * 4 + 16 * 300 * 4
    assert by_path["b/kernel"].bits == 0 * 3 * 13 + 16 * 1 * 4
    assert report.dense_bytes == 28
    assert report.total_bytes == (360 + 19200) // 8 + 8 + 28
    assert report.bits_per_weight == (360 + 19200 + 64) / 260
    assert by_path["a/kernel"].bits_per_weight == (360 + 19200) / 130


@pytest.mark.parametrize(
    ("g", "n", "paper"), [(4, 65500, 4.14), (5, 65500, 3.38), (6, 65500, 2.89), (8, 32000, 2.02), (9, 50000, 2.03)]
)
def test_bits_per_weight_of_llama_2_7b_are_those_of_the_published_table(g, n, paper):
    from cluscomp_jax.clustering.rules import total_bits_per_weight

    d, inner = 4096, 11008
    matrices = dict.fromkeys("qkvo", (d, d)) | {"gate": (d, inner), "up": (d, inner), "down": (inner, d)}
    assert round(total_bits_per_weight(matrices, g=g, num_codes=n), 2) == paper


def test_decompress_decodes_every_codebook_array_and_keeps_the_rest():
    w = random_array(np.random.default_rng(6), (5, 6), 4, 9, "out")
    dense = cluscomp_jax.decompress({"x": {"kernel": w, "bias": np.ones(6)}})
    np.testing.assert_array_equal(dense["x"]["kernel"], decoded_by_hand(w))
    np.testing.assert_array_equal(dense["x"]["bias"], 1)


def test_the_key_of_a_matrix_is_its_own():
    keys = [matrix.matrix_key(seed, path) for seed, path in ((0, "a"), (0, "b"), (1, "a"))]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": "up"}, "axis is 'up'"),
        ({"matrix_shape": (10, 99)}, "index has shape"),
        ({"index": np.zeros((10, 4), np.uint16)}, "9 codes need uint8"),
        ({"index": np.full((10, 4), 9, np.uint8)}, "names code 9, the codebook has 9"),
        ({"codebook": np.zeros(9)}, "must be [codes, group]"),
        ({"codebook": np.zeros((9, 33))}, "group 1 to 32"),
    ],
)
def test_validate_names_what_does_not_fit(change, message):
    import dataclasses

    w = random_array(np.random.default_rng(7), (10, 13), 4, 9, "out")
    with pytest.raises(InputError) as error:
        validate(dataclasses.replace(w, **change), "somewhere")
    assert message in str(error.value)
    assert str(error.value).startswith("somewhere: ")


@pytest.mark.parametrize("step_bits", [None, 4])
@pytest.mark.parametrize("put", [np.asarray, jnp.asarray])
@pytest.mark.nans
def test_weights_that_are_not_finite_are_refused_whatever_the_coding(step_bits, put):
    weight = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    weight[3, 5] = np.nan
    rule = CompressionRule(group_size=2, num_codes=16, step_bits=step_bits)
    with pytest.raises(InputError, match="the weights hold NaN or Inf"):
        matrix.cluster_matrix(put(weight), rule, EXACT, key=jax.random.key(0))
