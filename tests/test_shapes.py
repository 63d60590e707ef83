"""Shapes and dtypes of public functions are those of their docstrings; `shapes` has them as annotations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from jaxtyping import Array, Float, TypeCheckError

from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.kmeans import build_code_index

KEY = jax.random.key(0)


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def whole(*shape: int, dtype: Any = jnp.int32, below: int = 4) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).integers(0, below, shape), dtype)


HESSIAN = jnp.diag(jnp.arange(1.0, 7.0))
FACTOR = (jnp.arange(6, dtype=jnp.int32), jnp.sqrt(HESSIAN))
"""6 input channels; the weights of these tests are [6, 10] in vectors of 4, so that the last vector is padded."""
KERNEL = CodebookArray(normal(4, 4), whole(6, 3, dtype=jnp.uint8), (6, 10))
FIT = {"num_codes": 3, "key": KEY, "iterations": 2}
REFINE = {"rounds": 1, "search": NearestCodes(), "key": KEY}

RIGHT = [
    *(
        (shapes.decode, (normal(4, 4, dtype=dtype), whole(*index, dtype=kind)), {"shape": (6, 10), "axis": axis})
        for dtype, index, kind, axis in (
            (jnp.float32, (6, 3), jnp.uint8, "out"),
            (jnp.bfloat16, (2, 10), jnp.uint16, "in"),
        )
    ),
    (shapes.linear, (normal(6), normal(6, 10)), {}),
    (shapes.linear, (normal(2, 3, 6, dtype=jnp.bfloat16), normal(6, 10), normal(10)), {"out_dtype": jnp.float32}),
    (shapes.linear, (normal(2, 3, 6, dtype=jnp.bfloat16), KERNEL, normal(10)), {}),
    (shapes.token_weights, (normal(2, 3, 8), 5.0), {}),
    (shapes.mean_squared_error, (normal(2, 3, 8, dtype=jnp.bfloat16), normal(2, 3, 8)), {}),
    (shapes.mean_squared_error, (normal(2, 3, 8), normal(2, 3, 8)), {"massive_activation_limit": 5.0}),
    (shapes.token_nll, (normal(2, 3, 8, dtype=jnp.float16), whole(2, 3)), {}),
    (shapes.divergence, (normal(2, 3, 8), normal(2, 3, 8, dtype=jnp.bfloat16), 2.0), {}),
    (shapes.blocked_cholesky, (HESSIAN,), {}),
    (shapes.assign, (normal(9, 4, dtype=jnp.bfloat16), normal(5, 4)), {}),
    (shapes.fit_codebook, (normal(9, 4, dtype=jnp.float16),), {**FIT, "weights": jnp.ones(9)}),
    (shapes.fit_codebook, (np.ones((9, 4), np.float32),), FIT),
    (shapes.nearest_code, (normal(9, 4), normal(5, 4), None), {}),
    (shapes.nearest_code, (normal(9, 1), normal(1100, 1), build_code_index(normal(1100, 1), KEY), whole(9)), {}),
    (shapes.factor_hessian, (HESSIAN,), {}),
    (
        shapes.assign_with_error_feedback,
        (normal(6, 10, dtype=jnp.bfloat16), normal(5, 4), FACTOR),
        {"search": NearestCodes()},
    ),
    (shapes.refine, (normal(6, 10), normal(5, 4, dtype=jnp.bfloat16), whole(6, 3), FACTOR), REFINE),
]

WRONG = [
    (shapes.decode, (normal(4, 4, 1), whole(6, 3, dtype=jnp.uint8)), {"shape": (6, 10), "axis": "out"}),
    (shapes.decode, (normal(4, 4), whole(6, 3, dtype=jnp.int32)), {"shape": (6, 10), "axis": "out"}),
    (shapes.linear, (normal(2, 5), normal(6, 10)), {}),
    (shapes.linear, (normal(2, 5), KERNEL), {}),
    (shapes.linear, (normal(2, 6), KERNEL, normal(1)), {}),
    (shapes.token_weights, (normal(3, 8), 5.0), {}),
    (shapes.mean_squared_error, (normal(2, 3, 8), normal(2, 3, 1)), {}),
    (shapes.token_nll, (normal(2, 3, 8), whole(2, 1)), {}),
    (shapes.token_nll, (normal(2, 3, 8), normal(2, 3)), {}),
    (shapes.divergence, (normal(2, 3, 8), normal(2, 3, 1), 2.0), {}),
    (shapes.blocked_cholesky, (normal(6, 5),), {}),
    (shapes.blocked_cholesky, (HESSIAN.astype(jnp.bfloat16),), {}),
    (shapes.assign, (normal(9, 4), normal(5, 3)), {}),
    (shapes.assign, (whole(9, 4), normal(5, 4)), {}),
    (shapes.fit_codebook, (normal(9, 4),), {**FIT, "weights": jnp.ones(8)}),
    (shapes.nearest_code, (normal(9, 4), normal(5, 4), None, whole(8)), {}),
    (shapes.factor_hessian, (normal(6, 5),), {}),
    (shapes.assign_with_error_feedback, (normal(7, 10), normal(5, 4), FACTOR), {"search": NearestCodes()}),
    (shapes.refine, (normal(6, 10), normal(5, 4), whole(5, 3), FACTOR), REFINE),
]


def name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("function", "arguments", "options"), RIGHT, ids=name)
def test_results_have_their_declared_shapes(function: Callable[..., Any], arguments: tuple, options: dict) -> None:
    function(*arguments, **options)


@pytest.mark.parametrize(("function", "arguments", "options"), WRONG, ids=name)
def test_other_shapes_are_refused(function: Callable[..., Any], arguments: tuple, options: dict) -> None:
    with pytest.raises(TypeCheckError):
        function(*arguments, **options)


def test_a_result_of_another_shape_is_refused() -> None:
    @shapes.checked
    def head(x: Float[Array, "m g"]) -> Float[Array, "m g"]:
        return x[:1]

    head(normal(1, 4))
    with pytest.raises(TypeCheckError):
        head(normal(2, 4))


def test_the_dtype_is_that_of_the_arguments() -> None:
    index = whole(6, 3, dtype=jnp.uint8)
    assert shapes.decode(normal(4, 4, dtype=jnp.float16), index, shape=(6, 10), axis="out").dtype == jnp.float16
    x = normal(2, 6, dtype=jnp.bfloat16)
    assert shapes.linear(x, KERNEL).dtype == jnp.bfloat16
    assert shapes.linear(x, KERNEL, out_dtype=jnp.float32).dtype == jnp.float32
