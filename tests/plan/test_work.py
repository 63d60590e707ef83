"""What a plan counts of the GPU kernels: their own statements of operations."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cluscomp_jax.plan.work import count_work
from pallas_kernels.codebook_matmul import codebook_matmul

M, SHAPE, CODES, G = 16, (64, 96), 256, 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_product_by_codes_has_the_operations_of_a_dense_one(dtype: jnp.dtype) -> None:
    x, codebook = jnp.zeros((M, SHAPE[0]), dtype), jnp.zeros((CODES, G), dtype)
    index = jnp.zeros((SHAPE[0], SHAPE[1] // G), jnp.uint8)
    product = partial(codebook_matmul, shape=SHAPE, axis="out", implementation="interpret")
    dense = 2 * M * SHAPE[0] * SHAPE[1]
    work = count_work(jax.make_jaxpr(product)(x, codebook, index))
    counted, other = (work.matrix, work.vector) if dtype == jnp.bfloat16 else (work.vector, work.matrix)
    assert dense <= counted < 1.1 * dense
    assert other < 0.1 * dense
    assert work.moved >= x.nbytes + codebook.nbytes + index.nbytes

    def loss(x: jax.Array, codebook: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(product(x, codebook, index).astype(jnp.float32)))

    whole = count_work(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, codebook))
    if dtype == jnp.bfloat16:
        assert whole.matrix == 3 * dense  # the product, and one for each of the two gradients
    else:
        assert whole.matrix == 0
        assert whole.vector >= 3 * dense
