"""The forest against comparing with every code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.error_feedback import assign_with_error_feedback, factor_hessian
from cluscomp_jax.kmeans import build_code_index, nearest_code

KEY = jax.random.key(3)


def points(m: int, g: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(8, (m, g)).astype(np.float32)


def squared_distances(vectors: np.ndarray, codes: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.square(vectors.astype(np.float64) - codes[np.asarray(index)]).sum(1)


def exact(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.stack([np.square(codes.astype(np.float64) - vector).sum(1).argmin() for vector in vectors])


@pytest.mark.parametrize(("g", "n"), [(4, 5000), (4, 65536), (2, 2050), (8, 9000)])
def test_nearly_every_code_is_the_nearest(g: int, n: int) -> None:
    codes, vectors = points(n, g, 0), points(300, g, 1)
    code_index = build_code_index(jnp.asarray(codes), KEY)
    assert code_index is not None
    found = nearest_code(jnp.asarray(vectors), jnp.asarray(codes), code_index)
    best = squared_distances(vectors, codes, exact(vectors, codes))
    assert squared_distances(vectors, codes, found).sum() < 1.01 * best.sum()
    again = nearest_code(jnp.asarray(vectors), jnp.asarray(codes), build_code_index(jnp.asarray(codes), KEY))
    np.testing.assert_array_equal(found, again)


def test_a_known_code_is_kept_unless_a_nearer_one_is_found() -> None:
    codes, vectors = points(5000, 4, 0), points(200, 4, 1)
    code_index = build_code_index(jnp.asarray(codes), KEY)
    best = exact(vectors, codes)
    np.testing.assert_array_equal(
        nearest_code(jnp.asarray(vectors), jnp.asarray(codes), code_index, jnp.asarray(best)), best
    )
    far = jnp.full(200, 7)
    found = nearest_code(jnp.asarray(vectors), jnp.asarray(codes), code_index, far)
    assert np.all(squared_distances(vectors, codes, found) <= squared_distances(vectors, codes, far))


def test_few_codes_are_all_compared() -> None:
    codes, vectors = points(256, 4, 0), points(100, 4, 1)
    assert build_code_index(jnp.asarray(codes), KEY) is None
    np.testing.assert_array_equal(nearest_code(jnp.asarray(vectors), jnp.asarray(codes), None), exact(vectors, codes))


def test_error_feedback_among_many_codes_loses_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 48)) @ rng.standard_normal((48, 48))
    hessian = (inputs.T @ inputs / 200).astype(np.float32)
    weight, codes = points(48, 64, 1), points(6000, 4, 2)
    factor = factor_hessian(jnp.asarray(hessian))

    def output_error(code_index: object) -> float:
        index = assign_with_error_feedback(jnp.asarray(weight), jnp.asarray(codes), factor, NearestCodes(code_index))
        error = weight.astype(np.float64) - codes[np.asarray(index)].reshape(48, 64)
        return float(np.einsum("io,ij,jo->", error, hessian, error))

    assert output_error(build_code_index(jnp.asarray(codes), KEY)) < 1.02 * output_error(None)
