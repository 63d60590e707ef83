"""Rotary embeddings: what the formulas promise. Equality with PyTorch is in test_llama_logits.py."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import epsilon

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layers.rope import (
    RopeConfig,
    inverse_frequencies,
    rotary_tables,
    rotate,
    yarn_attention_factor,
)

HEAD_DIM = 16
PLAIN = 10000.0 ** (-np.arange(8) / 8)

FEW = 16 * epsilon()
"""A power, a product and a quotient or two."""


def frequencies(length=1, **numbers):
    return np.asarray(inverse_frequencies(RopeConfig(**numbers), HEAD_DIM, length))


def test_default_and_linear_are_a_geometric_series():
    np.testing.assert_allclose(frequencies(), PLAIN, rtol=FEW)
    np.testing.assert_allclose(frequencies(rope_type="linear", factor=4.0), PLAIN / 4, rtol=FEW)
    assert frequencies().dtype == np.float32


def test_dynamic_is_plain_within_the_original_context_and_raises_the_base_beyond():
    numbers = {"rope_type": "dynamic", "factor": 2.0, "original_max_positions": 100}
    np.testing.assert_allclose(frequencies(7, **numbers), PLAIN, rtol=1e-5)
    np.testing.assert_allclose(frequencies(100, **numbers), PLAIN, rtol=1e-5)
    base = 10000.0 * (2.0 * 300 / 100 - 1.0) ** (16 / 14)
    np.testing.assert_allclose(frequencies(300, **numbers), base ** (-np.arange(8) / 8), rtol=1e-5)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    actual = frequencies(rope_type="llama3", factor=8.0, original_max_positions=512)
    wavelengths = 2 * math.pi / PLAIN
    kept, stretched = wavelengths < 512 / 4, wavelengths > 512
    assert kept.any()
    assert stretched.any()
    np.testing.assert_allclose(actual[kept], PLAIN[kept], rtol=FEW)
    np.testing.assert_allclose(actual[stretched], PLAIN[stretched] / 8, rtol=FEW)
    between = ~kept & ~stretched
    assert between.any()
    share = (512 / wavelengths[between] - 1) / 3
    np.testing.assert_allclose(actual[between], PLAIN[between] * (share + (1 - share) / 8), rtol=FEW)


def test_yarn_ramps_from_kept_to_stretched_over_the_pairs():
    stretch = PLAIN / frequencies(rope_type="yarn", factor=4.0, original_max_positions=256)
    np.testing.assert_allclose(stretch[[0, -1]], [1.0, 4.0], rtol=1e-5)
    assert (np.diff(stretch) > -1e-5).all()
    turns = 256 * PLAIN / (2 * math.pi)
    np.testing.assert_allclose(stretch[turns > 32 * 10 ** (4 / 8)], 1.0, rtol=1e-5)
    np.testing.assert_allclose(stretch[turns < 10 ** (-4 / 8)], 4.0, rtol=1e-5)


def test_yarn_attention_factor():
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(40.0) == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0
    assert yarn_attention_factor(40.0, 0.7, 0.0) == yarn_attention_factor(40.0)


@settings(max_examples=20)
@given(
    positions=st.tuples(st.integers(0, 4000), st.integers(0, 4000)), shift=st.integers(0, 4000), seed=st.integers(0, 99)
)
def test_rotation_keeps_lengths_and_products_depend_on_distance_alone(positions, shift, seed):
    x = np.random.default_rng(seed).normal(size=(1, 2, 1, HEAD_DIM)).astype(np.float32)

    def turned(offset):
        tables = rotary_tables(RopeConfig(), HEAD_DIM, np.asarray(positions) + offset, 1, np.float32)
        return np.asarray(rotate(x, tables), np.float64)[0, :, 0]

    here, there = turned(0), turned(shift)
    np.testing.assert_allclose((here**2).sum(-1), (x[0, :, 0] ** 2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(here[0] @ here[1], there[0] @ there[1], atol=2e-2)


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_turn_as_halves_do(seed):
    """Channels 2c and 2c + 1 turn as c and c + h/2 of the same heads in the other order."""
    x = np.random.default_rng(seed).normal(size=(1, 5, 2, HEAD_DIM)).astype(np.float32)
    tables = rotary_tables(RopeConfig(), HEAD_DIM, np.arange(5), 5, np.float32)
    order = [c // 2 + c % 2 * (HEAD_DIM // 2) for c in range(HEAD_DIM)]
    turned = rotate(x[..., order], tables, neighbours=True)
    np.testing.assert_array_equal(turned, np.asarray(rotate(x, tables))[..., order])


def test_tables_carry_the_attention_factor():
    rope = RopeConfig(rope_type="yarn", factor=2.0, original_max_positions=64, attention_factor=1.25)
    cosine, sine = rotary_tables(rope, HEAD_DIM, np.arange(5), 5, np.float32)
    np.testing.assert_allclose(cosine**2 + sine**2, 1.25**2, rtol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"rope_type": "su"}, "rope type 'su'"),
        ({"theta": -1.0}, "theta is -1.0"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings of at least 1, not 0"),
        ({"attention_factor": float("nan")}, "attention_factor is nan"),
    ],
)
def test_bad_numbers_are_refused(numbers, message):
    with pytest.raises(InputError, match=message):
        RopeConfig(**numbers)
