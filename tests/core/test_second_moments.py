"""Second moments against sums of outer products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.core.second_moments import cross_moment, dot, row_blocks, second_moment, symmetric

DTYPES = ["float32", "bfloat16", "float16"]


def rows_of(m, i, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, i)), dtype)


def outer_sum(x, e, weights):
    x, e = np.asarray(x, np.float64), np.asarray(e, np.float64)
    return sum(w * np.outer(one, other) for w, one, other in zip(weights, x, e, strict=True))


def assert_near(found, expected, tolerance):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("i", [5, 128, 300])
def test_a_second_moment_is_the_sum_of_outer_products(i, dtype):
    x = rows_of(50, i, dtype)
    blocks = second_moment(x)
    assert len(blocks) == (1 if dtype == "float32" else -(-i // 128))
    found = symmetric(blocks)
    assert_near(found, outer_sum(x, x, np.ones(50)), 1e-6)
    np.testing.assert_array_equal(found, found.T)


def test_the_columns_before_a_block_are_not_computed():
    i = 8 * 256
    sides = [block.shape for block in jax.eval_shape(second_moment, jax.ShapeDtypeStruct((4, i), "bfloat16"))]
    assert sides == [(256, i - first) for first in range(0, i, 256)]
    assert row_blocks(8 * 256 + 1)[-1] == (5 * 384, 8 * 256 + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_of_weight_0_and_1_lose_nothing_and_others_no_more_than_their_dtype(dtype):
    x, e = rows_of(60, 200, dtype), rows_of(60, 30, dtype, seed=1).astype(jnp.float32)
    for weights, tolerance in (
        (np.arange(60) % 2, 1e-6),
        (np.linspace(0.1, 1, 60), 1e-6 if dtype == "float32" else 4e-3),
    ):
        given = jnp.asarray(weights, jnp.float32).reshape(6, 10)
        hessian = symmetric(second_moment(x, given))
        assert_near(hessian, outer_sum(x, x, weights), tolerance)
        assert_near(cross_moment(x, e, given), outer_sum(x, e, weights), tolerance)
        if dtype != "float32":
            np.testing.assert_array_equal(hessian, hessian.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_are_multiplied_in_their_own_16_bit(dtype):
    text = jax.jit(dot).lower(rows_of(8, 16, dtype), rows_of(16, 4, "float32")).as_text()
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    assert f"(tensor<8x16x{short}>, tensor<16x4x{short}>) -> tensor<8x4xf32>" in text


def test_other_dtypes_are_multiplied_in_float32():
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (20, 6)), jnp.int8)
    (whole,) = second_moment(x)
    assert_near(whole, outer_sum(x, x, np.ones(20)), 0)
