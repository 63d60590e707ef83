"""fit_codebook against a float64 Lloyd, its properties, and the odd inputs."""

import sys

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from cluscomp_jax.errors import InputError
from cluscomp_jax.kmeans import assign, fit_codebook, fit_codebooks


def squared_distances(vectors, codebook):
    return ((vectors[:, None, :].astype(np.float64) - codebook[None].astype(np.float64)) ** 2).sum(-1)


def lloyd(vectors, codebook, weights, iterations):
    """Float64 Lloyd from a given start, for problems in which no cluster falls empty."""
    vectors, codebook = vectors.astype(np.float64), codebook.astype(np.float64)
    for _ in range(iterations):
        index = squared_distances(vectors, codebook).argmin(1)
        for code in range(len(codebook)):
            members = index == code
            if members.any():
                codebook[code] = np.average(vectors[members], axis=0, weights=weights[members])
    return codebook


@pytest.mark.parametrize(("m", "n", "g"), [(1, 1, 1), (100, 7, 3), (333, 16, 4), (1000, 17, 9), (50, 33, 32)])
def test_assign_finds_the_nearest_code(m, n, g):
    rng = np.random.default_rng(m)
    vectors, codebook = rng.standard_normal((m, g)).astype(np.float32), rng.standard_normal((n, g)).astype(np.float32)
    index, distance = assign(jnp.asarray(vectors), jnp.asarray(codebook))
    expected = squared_distances(vectors, codebook)
    chex.assert_shape([index, distance], (m,))
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), rtol=1e-5, atol=1e-7)


def test_assign_gives_ties_to_the_lowest_code():
    codebook = jnp.ones((40, 2))
    index, _ = assign(jnp.zeros((5, 2)), codebook)
    np.testing.assert_array_equal(index, 0)


def test_assign_does_not_depend_on_the_chunk(monkeypatch):
    module = sys.modules["cluscomp_jax.kmeans.assign"]  # the package offers the function under this name
    rng = np.random.default_rng(0)
    lanes, codebook = (
        jnp.asarray(rng.standard_normal((4, 1000)), jnp.float32),
        jnp.asarray(rng.standard_normal((50, 4)), jnp.float32),
    )
    whole = module.nearest_lanes(lanes, codebook)
    monkeypatch.setattr(module, "_CHUNK", 37)
    chex.assert_trees_all_equal(module.nearest_lanes(lanes, codebook), whole)


@pytest.mark.parametrize("weighted", [False, True])
def test_same_start_same_fixed_point_as_float64_lloyd(weighted):
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((6, 3)) * 10
    vectors = (centres[rng.integers(0, 6, 600)] + rng.standard_normal((600, 3)) * 0.3).astype(np.float32)
    weights = rng.uniform(0.1, 5, 600).astype(np.float32) if weighted else None
    options = {"num_codes": 6, "key": jax.random.key(1), "weights": weights, "accelerate": False}
    start, _, _ = fit_codebook(vectors, **options, iterations=0)
    codebook, index, stats = fit_codebook(vectors, **options, iterations=15)
    assert stats.reseeded == 0
    expected = lloyd(vectors, np.asarray(start), np.ones(600) if weights is None else weights, 15)
    np.testing.assert_allclose(codebook, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(index, squared_distances(vectors, expected).argmin(1))


def test_index_and_inertia_are_those_of_the_returned_codebook():
    rng = np.random.default_rng(4)
    vectors = rng.standard_t(4, (2000, 4)).astype(np.float32)
    weights = rng.exponential(1.0, 2000).astype(np.float32)
    codebook, index, stats = fit_codebook(vectors, num_codes=64, key=jax.random.key(1), weights=weights, iterations=8)
    distances = squared_distances(vectors, np.asarray(codebook))
    np.testing.assert_allclose(distances[np.arange(2000), index], distances.min(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats.inertia[-1], (distances.min(1) * weights).sum(), rtol=1e-4)
    assert len(stats.inertia) == 9


@given(seed=st.integers(0, 2**31), size=st.sampled_from([(2, 9, 1), (50, 1, 7), (400, 4, 40)]))
@settings(max_examples=12)
def test_inertia_never_rises(seed, size):
    m, g, n = size
    vectors = np.random.default_rng(seed).standard_normal((m, g)).astype(np.float32)
    _, index, stats = fit_codebook(vectors, num_codes=n, key=jax.random.key(seed), iterations=6, accelerate=False)
    inertia = np.array(stats.inertia)
    assert np.all(np.diff(inertia) <= 1e-5 * inertia[0] + 1e-9)
    assert index.min() >= 0
    assert index.max() < n


@given(seed=st.integers(0, 2**31))
@settings(max_examples=5)
def test_scaling_the_vectors_scales_the_codebook(seed):
    vectors = np.random.default_rng(seed).standard_normal((300, 4)).astype(np.float32)
    one, index_one, _ = fit_codebook(vectors, num_codes=20, key=jax.random.key(seed), iterations=5)
    four, index_four, _ = fit_codebook(vectors * 4, num_codes=20, key=jax.random.key(seed), iterations=5)
    np.testing.assert_array_equal(index_one, index_four)
    np.testing.assert_array_equal(np.asarray(one) * 4, four)


def test_weight_two_equals_the_vector_twice():
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((200, 3)).astype(np.float32)
    weights = rng.integers(1, 3, 200).astype(np.float32)
    codebook, _, weighted = fit_codebook(vectors, num_codes=9, key=jax.random.key(2), weights=weights, iterations=0)
    repeated = np.repeat(vectors, weights.astype(int), axis=0)
    np.testing.assert_allclose(
        weighted.inertia[0], squared_distances(repeated, np.asarray(codebook)).min(1).sum(), rtol=1e-5
    )
    after, _, _ = fit_codebook(
        vectors, num_codes=9, key=jax.random.key(2), weights=weights, iterations=7, accelerate=False
    )
    expected = lloyd(repeated, np.asarray(codebook), np.ones(len(repeated)), 7)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)


def test_weights_lower_the_weighted_error_at_equal_codes():
    rng = np.random.default_rng(6)
    vectors = rng.standard_normal((4000, 4)).astype(np.float32)
    weights = np.exp(2 * rng.standard_normal(4000)).astype(np.float32)
    errors = []
    for given_weights in (None, weights):
        codebook, _, _ = fit_codebook(vectors, num_codes=64, key=jax.random.key(0), weights=given_weights)
        errors.append((squared_distances(vectors, np.asarray(codebook)).min(1) * weights).sum())
    assert errors[1] < 0.9 * errors[0]


def test_same_key_same_bytes_other_key_other_bytes():
    vectors = np.random.default_rng(7).standard_normal((500, 4)).astype(np.float32)
    first, again, other = (fit_codebook(vectors, num_codes=30, key=jax.random.key(k))[:2] for k in (1, 1, 2))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sixteen_bit_vectors_are_clustered_in_float32(dtype):
    vectors = jnp.asarray(np.random.default_rng(8).standard_normal((300, 4)), dtype)
    codebook, index, stats = fit_codebook(vectors, num_codes=16, key=jax.random.key(0))
    same, same_index, _ = fit_codebook(vectors.astype(jnp.float32), num_codes=16, key=jax.random.key(0))
    assert codebook.dtype == jnp.float32
    chex.assert_trees_all_equal((codebook, index), (same, same_index))
    chex.assert_tree_all_finite(stats.inertia)


@pytest.mark.parametrize(("m", "distinct", "n"), [(5, 5, 8), (8, 8, 8), (1000, 3, 8), (1000, 8, 8), (7, 1, 1)])
def test_few_distinct_vectors_are_exact(m, distinct, n):
    rng = np.random.default_rng(9)
    values = rng.standard_normal((distinct, 4)).astype(np.float32)
    vectors = values[np.concatenate([np.arange(distinct), rng.integers(0, distinct, m - distinct)])]
    codebook, index, stats = fit_codebook(vectors, num_codes=n, key=jax.random.key(0))
    chex.assert_shape(codebook, (n, 4))
    np.testing.assert_array_equal(np.asarray(codebook)[np.asarray(index)], vectors)
    assert stats.inertia[-1] == 0


def test_empty_clusters_are_refilled_where_the_error_is_largest():
    rng = np.random.default_rng(10)
    # Nearly all vectors are copies of one: the start puts several codes on top of each other.
    vectors = np.concatenate([np.zeros((950, 2)), rng.standard_normal((50, 2))]).astype(np.float32)
    _, index, stats = fit_codebook(vectors, num_codes=40, key=jax.random.key(0), iterations=10)
    assert stats.reseeded > 0
    assert len(np.unique(index)) == 40
    assert stats.inertia[-1] < 0.2 * stats.inertia[0]


def test_one_huge_outlier_takes_one_code_and_no_more():
    vectors = np.random.default_rng(11).standard_normal((500, 4)).astype(np.float32)
    vectors[3] = 1e6
    codebook, index, _ = fit_codebook(vectors, num_codes=32, key=jax.random.key(0), iterations=20)
    assert np.sum(np.asarray(index) == index[3]) == 1
    np.testing.assert_allclose(np.asarray(codebook)[index[3]], 1e6)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (np.zeros((0, 4), np.float32), {}, "m >= 1"),
        (np.zeros(4, np.float32), {}, "shape (4,)"),
        (np.zeros((5, 33), np.float32), {}, "33 components"),
        (np.zeros((5, 4), np.float32), {"num_codes": 0}, "num_codes is 0"),
        (np.zeros((5, 4), np.float32), {"num_codes": 65537}, "num_codes is 65537"),
        (np.zeros((5, 4), np.float32), {"iterations": -1}, "iterations is -1"),
        (np.zeros((5, 4), np.float32), {"weights": np.ones(4, np.float32)}, "(4,)"),
        (np.zeros((5, 4), np.float32), {"weights": np.array([1, 1, -2, 1, 1], np.float32)}, "weights[2] is -2.0"),
        (np.array([[0, 1], [np.nan, 0]], np.float32), {}, "vectors[1, 0] is nan"),
        (np.array([[0, np.inf], [0, 0]], np.float32), {}, "vectors[0, 1] is inf"),
    ],
)
@pytest.mark.nans
def test_bad_input_is_named(vectors, options, message):
    with pytest.raises(InputError) as error:
        fit_codebook(vectors, **({"num_codes": 2, "key": jax.random.key(0)} | options))
    assert message in str(error.value)


def test_permuting_the_vectors_permutes_the_index() -> None:
    rng = np.random.default_rng(12)
    vectors, codebook = rng.standard_normal((500, 4)).astype(np.float32), rng.standard_normal((40, 4))
    order = rng.permutation(500)
    index, _ = assign(jnp.asarray(vectors), jnp.asarray(codebook))
    permuted, _ = assign(jnp.asarray(vectors[order]), jnp.asarray(codebook))
    np.testing.assert_array_equal(permuted, np.asarray(index)[order])


def heavy_tailed(m, g, seed=0):
    return np.random.default_rng(seed).standard_t(4, (m, g)).astype(np.float32)


@pytest.mark.parametrize(("m", "n", "g"), [pytest.param(20000, 1000, 4, marks=pytest.mark.long), (6000, 400, 16)])
def test_of_many_codes_almost_every_vector_gets_the_nearest(m, n, g):
    vectors = heavy_tailed(m, g)
    codebook, index, stats = fit_codebook(vectors, num_codes=n, key=jax.random.key(0))
    _, nearest = assign(jnp.asarray(vectors), codebook)
    distance = np.square(vectors - np.asarray(codebook)[np.asarray(index)]).sum(1)
    assert np.mean(distance > np.asarray(nearest) * (1 + 1e-4) + 1e-6) < 1e-3
    assert distance.sum() < np.asarray(nearest).sum() * 1.0005
    np.testing.assert_allclose(stats.inertia[-1], distance.sum(), rtol=1e-4)
    assert 0 <= stats.certified <= 1
    assert len(stats.inertia) == 21


def test_acceleration_reaches_in_half_the_iterations_what_plain_updates_reach():
    vectors = heavy_tailed(20000, 4)
    plain = fit_codebook(vectors, num_codes=300, key=jax.random.key(0), iterations=20, accelerate=False)[2]
    half = fit_codebook(vectors, num_codes=300, key=jax.random.key(0), iterations=10)[2]
    whole = fit_codebook(vectors, num_codes=300, key=jax.random.key(0), iterations=20)[2]
    assert half.inertia[-1] < 1.005 * plain.inertia[-1]
    assert whole.inertia[-1] < 0.99 * plain.inertia[-1]


def test_the_error_is_below_that_of_plain_lloyd_from_a_uniform_start():
    vectors, n = heavy_tailed(6000, 4), 300
    start = vectors[np.random.default_rng(0).permutation(len(vectors))[:n]]
    reference = squared_distances(vectors, lloyd(vectors, start, np.ones(len(vectors)), 20)).min(1).sum()
    _, _, stats = fit_codebook(vectors, num_codes=n, key=jax.random.key(0))
    assert stats.inertia[-1] < 0.93 * reference


@pytest.mark.parametrize("kind", ["outlier", "copies", "clusters", "one direction", "unweighted half", "tiny"])
def test_odd_vectors_with_many_codes_are_sound(kind):
    rng = np.random.default_rng(13)
    vectors, weights = rng.standard_normal((4000, 4)).astype(np.float32), None
    if kind == "outlier":
        vectors[7] = 1e6
    elif kind == "copies":
        vectors[:3500] = 1.0
    elif kind == "clusters":
        vectors = (vectors * 1e-3 + rng.integers(0, 2, (4000, 1)) * 100).astype(np.float32)
    elif kind == "one direction":
        vectors[:, 1:] = 0.0
    elif kind == "unweighted half":
        weights = (np.arange(4000) % 2).astype(np.float32)
    else:
        vectors *= np.float32(1e-12)
    codebook, index, stats = fit_codebook(vectors, num_codes=300, key=jax.random.key(0), weights=weights)
    mass = np.ones(4000) if weights is None else weights
    error = (np.square(vectors - np.asarray(codebook)[np.asarray(index)]).sum(1) * mass).sum()
    spread = (np.square(vectors - vectors.mean(0)).sum(1) * mass).sum()
    chex.assert_tree_all_finite((codebook, stats.inertia))
    assert 0 <= index.min() <= index.max() < 300
    assert error < 0.08 * spread
    if kind == "outlier":
        assert np.sum(np.asarray(index) == index[7]) == 1


def test_a_batch_is_each_matrix_by_itself():
    vectors = np.stack([heavy_tailed(500, 4, seed) for seed in range(3)])
    weights = np.random.default_rng(0).exponential(1, (3, 500)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 3)
    codebooks, index, stats = fit_codebooks(vectors, num_codes=20, keys=keys, weights=weights, iterations=3)
    chex.assert_shape([codebooks, index], [(3, 20, 4), (3, 500)])
    for i in range(3):
        alone = fit_codebook(vectors[i], num_codes=20, key=keys[i], weights=weights[i], iterations=3)
        chex.assert_trees_all_equal((codebooks[i], index[i]), alone[:2])
        assert stats[i].inertia == alone[2].inertia


@pytest.mark.parametrize(
    ("shape", "keys", "weights", "message"),
    [
        ((5, 4), 5, None, "[k, m, g]"),
        ((2, 5, 4), 3, None, "2 matrices came with keys of shape (3,)"),
        ((2, 5, 4), 2, 3, "3 rows of weights"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(shape, keys, weights, message):
    with pytest.raises(InputError) as error:
        fit_codebooks(
            np.zeros(shape, np.float32),
            num_codes=2,
            keys=jax.random.split(jax.random.key(0), keys),
            weights=None if weights is None else np.ones((weights, 5), np.float32),
        )
    assert message in str(error.value)
