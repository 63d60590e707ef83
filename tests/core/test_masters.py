"""partition, combine and rounded: codebooks as the trainable parameters of optimizers that know nothing of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from cluscomp_jax import (
    CodebookArray,
    CompressionRule,
    InputError,
    cluster_tree,
    combine,
    decompress,
    partition,
    rounded,
    with_codebooks,
)


def tree():
    random = np.random.default_rng(0)
    dense = {
        "a": {"kernel": jnp.asarray(0.01 * random.standard_normal((8, 12)), jnp.float32)},
        "norm": jnp.ones(8, jnp.bfloat16),
        "steps": jnp.zeros((), jnp.int32),
    }
    return cluster_tree(dense, [CompressionRule(pattern="a/kernel", num_codes=8)])


def test_combine_undoes_partition():
    parts = partition(tree(), (".*",))
    joined = combine(*parts)
    assert joined["a"]["kernel"].codebook.dtype == np.float32
    assert joined["norm"].dtype == jnp.bfloat16
    back = rounded(joined)
    assert back["a"]["kernel"].codebook.dtype == np.float16
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_trains_is_float32_and_nothing_else():
    trained, frozen = partition(tree())
    assert [leaf.dtype for leaf in jax.tree.leaves(trained)] == [np.float32]
    assert len(jax.tree.leaves(frozen)) == 3
    everything, _ = partition(tree(), (".*",))
    assert len(jax.tree.leaves(everything)) == 2


def test_adam_trains_codebooks_where_in_float16_it_would_not():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((32, 8)), jnp.float32)
    trained, frozen = partition(tree())
    start = decompress(tree())["a"]["kernel"]
    wanted = x @ (start + 0.01)

    def loss(trained):
        y = with_codebooks(lambda p, x: x @ p["a"]["kernel"])(combine(trained, frozen), x)
        return jnp.mean(jnp.square(y - wanted))

    first = float(loss(trained))
    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        state = TrainState.create(apply_fn=None, params=trained, tx=optax.adam(1e-3))
        step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
        for _ in range(30):
            state = step(state)
    assert float(loss(state.params)) < 0.2 * first
    kernel = rounded(combine(state.params, frozen))["a"]["kernel"]
    assert np.isfinite(np.asarray(kernel)).all()
    np.testing.assert_array_equal(kernel.index, tree()["a"]["kernel"].index)


def test_a_shared_codebook_trains_once():
    owner = tree()["a"]["kernel"]
    both = {"b": {"q": owner, "k": dataclasses.replace(owner, tied_to="q")}}
    trained, frozen = partition(both)
    assert len(jax.tree.leaves(trained)) == 1
    moved = jax.tree.map(lambda leaf: leaf + 1, trained)
    joined = combine(moved, frozen)["b"]
    np.testing.assert_array_equal(joined["k"].codebook, joined["q"].codebook)
    lost = {"b": {"k": dataclasses.replace(owner, tied_to="q")}}
    with pytest.raises(InputError, match="has the codebook of 'q', which is not in the tree"):
        partition(lost)


def test_codes_that_float16_would_lose_are_kept_in_bfloat16():
    small = CodebookArray(jnp.full((4, 2), 3e-8, jnp.float32), jnp.zeros((3, 2), jnp.uint8), (3, 4))
    assert rounded({"w": small})["w"].codebook.dtype == jnp.bfloat16


def test_an_expression_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="trainable 'steps' matches no floating array"):
        partition(tree(), ("steps",))
    with pytest.raises(InputError, match="has no codebooks to train; cluster it first"):
        partition({"w": jnp.ones((2, 2))})
