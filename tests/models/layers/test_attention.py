"""Attention against a float64 oracle that loops over positions, and its gradient against autodiff of plain jnp."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax.models.layers.attention import attention, causal_attention, causal_mask


def random_inputs(t: int, s: int, *, b: int = 2, q: int = 6, k: int = 2, h: int = 8) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(t * 1000 + s)
    shapes = (b, t, q, h), (b, k, s, h), (b, k, s, h)
    return tuple(3 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def looped(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int | None) -> np.ndarray:
    b, t, q, h = queries.shape
    out = np.zeros((b, t, q, h))
    for sample in range(b):
        for i in range(t):
            first = 0 if window is None else max(0, i - window + 1)
            for head in range(q):
                kv = head * keys.shape[1] // q
                scores = keys[sample, kv, first : i + 1].astype(np.float64) @ queries[sample, i, head] / np.sqrt(h)
                weights = np.exp(scores - scores.max())
                out[sample, i, head] = weights @ values[sample, kv, first : i + 1] / weights.sum()
    return out


def plain(queries: jax.Array, keys: jax.Array, values: jax.Array, window: int | None) -> jax.Array:
    repeats = queries.shape[2] // keys.shape[1]
    keys, values = jnp.repeat(keys, repeats, axis=1), jnp.repeat(values, repeats, axis=1)
    scores = jnp.einsum("btqh,bqsh->bqts", queries, keys) / queries.shape[-1] ** 0.5
    positions = jnp.arange(queries.shape[1])
    weights = jax.nn.softmax(jnp.where(causal_mask(positions, positions, window), scores, -jnp.inf))
    return jnp.einsum("bqts,bqsh->btqh", weights, values)


@pytest.mark.parametrize("t", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_a_sequence_cut_into_segments_is_what_position_by_position_gives(t: int, window: int | None) -> None:
    inputs = random_inputs(t, t)
    np.testing.assert_allclose(causal_attention(*inputs, window), looped(*inputs, window), rtol=2e-5, atol=2e-5)


def test_a_long_sequence_has_no_more_segments_than_the_limit() -> None:
    lengths = {}
    for t in (512, 2048):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in random_inputs(t, t, b=1)]
        jaxpr = jax.make_jaxpr(lambda *inputs: causal_attention(*inputs, None))(*shapes)
        lengths[t] = sum(equation.primitive.name == "custom_vjp_call" for equation in jaxpr.eqns)
    assert lengths == {512: 8, 2048: 8}


@pytest.mark.parametrize("window", [None, 20])
def test_the_gradient_is_that_of_the_plain_definition(window: int | None) -> None:
    inputs = random_inputs(70, 70)
    cotangent = np.random.default_rng(0).standard_normal(inputs[0].shape).astype(np.float32)

    def pulled_back(function):
        return jax.vjp(lambda *args: function(*args, window), *map(jnp.asarray, inputs))[1](cotangent)

    for actual, expected in zip(pulled_back(causal_attention), pulled_back(plain), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("scale", "softcap"), [(0.9, None), (None, 4.0), (0.2, 1.5)])
def test_scale_and_softcap_and_their_gradients_are_those_of_the_plain_definition(
    scale: float | None, softcap: float | None
) -> None:
    inputs = random_inputs(70, 70)
    cotangent = np.random.default_rng(0).standard_normal(inputs[0].shape).astype(np.float32)

    def by_definition(queries, keys, values):
        repeats, h = queries.shape[2] // keys.shape[1], queries.shape[-1]
        keys, values = jnp.repeat(keys, repeats, axis=1), jnp.repeat(values, repeats, axis=1)
        scores = jnp.einsum("btqh,bqsh->bqts", queries, keys) * (h**-0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        positions = jnp.arange(queries.shape[1])
        weights = jax.nn.softmax(jnp.where(causal_mask(positions, positions, 20), scores, -jnp.inf))
        return jnp.einsum("bqts,bqsh->btqh", weights, values)

    def ours(*args):
        return causal_attention(*args, 20, scale, softcap)

    def value_and_pulled_back(function):
        value, pull = jax.vjp(function, *map(jnp.asarray, inputs))
        return value, *pull(cotangent)

    for actual, expected in zip(value_and_pulled_back(ours), value_and_pulled_back(by_definition), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_bfloat16_stays_within_its_rounding_of_float32_and_keeps_its_dtype() -> None:
    inputs = random_inputs(70, 70)
    short = [jnp.asarray(x, jnp.bfloat16) for x in inputs]

    def value_and_gradients(inputs):
        value, pull = jax.vjp(lambda *args: causal_attention(*args, None), *inputs)
        return value, *pull(jnp.ones_like(value))

    for actual, expected in zip(
        value_and_gradients(short), value_and_gradients([x.astype(jnp.float32) for x in short]), strict=True
    ):
        assert actual.dtype == jnp.bfloat16
        assert np.abs(actual.astype(jnp.float32) - expected).max() < 0.02 * np.abs(expected).max()


def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    queries, keys, values = (jnp.asarray(x) for x in random_inputs(9, 9))

    def total(queries, keys, values):
        return causal_attention(queries, keys, values, None).sum()

    for scale in (1e4, -1e4):
        chex.assert_tree_all_finite(jax.value_and_grad(total, argnums=(0, 1, 2))(scale * queries, keys, values))


def test_a_mask_over_a_cache_reads_only_what_it_shows() -> None:
    queries, keys, values = random_inputs(3, 12)
    mask = causal_mask(5 + jnp.arange(3), jnp.arange(12), None)
    expected = attention(queries, keys, values, mask)
    keys[:, :, 8:], values[:, :, 8:] = 1e3, -1e3
    np.testing.assert_array_equal(attention(queries, keys, values, mask), expected)
