"""Rules by path and the choice of (g, num_codes) for a budget."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cluscomp_jax.clustering import rules
from cluscomp_jax.config.clustering import DECODER_KERNELS, CompressionRule
from cluscomp_jax.errors import InputError

SHAPES = {
    "model/embed_tokens/embedding": (100, 64),
    "model/layers/0/self_attn/q_proj/kernel": (64, 64),
    "model/layers/0/mlp/down_proj/kernel": (128, 64),
    "model/layers/10/self_attn/q_proj/kernel": (64, 64),
    "model/layers/10/input_layernorm/weight": (64,),
}
KERNELS = {path: shape for path, shape in SHAPES.items() if path.endswith("kernel")}


def test_the_default_rule_matches_the_projections_of_every_block_and_nothing_else():
    assert rules.match((CompressionRule(),), SHAPES).keys() == KERNELS.keys()


def test_the_first_rule_that_matches_decides():
    fine = CompressionRule(pattern=r".*/down_proj/kernel", group_size=2, num_codes=16)
    matched = rules.match((fine, CompressionRule()), SHAPES)
    assert matched["model/layers/0/mlp/down_proj/kernel"] is fine
    assert matched["model/layers/10/self_attn/q_proj/kernel"].group_size == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model/layers/0", "matches none of the 5 parameters"),
        ("[", "not a regular expression"),
        (r".*layernorm/weight", "only matrices"),
    ],
)
def test_a_rule_that_cannot_stand_is_named(pattern, message):
    with pytest.raises(InputError) as error:
        rules.match((CompressionRule(pattern=pattern),), SHAPES)
    assert message in str(error.value)
    assert repr(pattern) in str(error.value)


LARGE = {"q": (4096, 4096), "down": (11008, 4096)}


@given(bits=st.floats(1.05, 8.0))
@settings(max_examples=40)
def test_allocate_meets_the_budget_and_leaves_less_than_half_a_bit(bits):
    rule = rules.allocate(LARGE, bits)
    spent = rules.total_bits_per_weight(LARGE, g=rule.group_size, num_codes=rule.num_codes)
    assert bits - 0.5 < spent <= bits


def test_a_larger_budget_never_predicts_more_distortion():
    chosen = [rules.allocate(LARGE, bits) for bits in (1.1, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)]
    distortions = [rules.predicted_distortion(rule.group_size, rule.num_codes) for rule in chosen]
    assert distortions == sorted(distortions, reverse=True)


def test_allocate_keeps_pattern_and_axis():
    rule = rules.allocate({"q": (100, 4096)}, 3.0, like=CompressionRule(pattern="q", axis="in"))
    assert (rule.pattern, rule.axis) == ("q", "in")
    assert (
        rules.total_bits_per_weight({"q": (100, 4096)}, g=rule.group_size, num_codes=rule.num_codes, axis="in") <= 3.0
    )
    assert CompressionRule().pattern == DECODER_KERNELS


def test_a_budget_that_nothing_reaches_names_the_least():
    with pytest.raises(InputError, match=r"bits is 0\.01; the least .* is 0\.03"):
        rules.allocate(LARGE, 0.01)


@pytest.mark.parametrize("g", range(1, 33))
def test_predicted_distortion_falls_with_codes_and_stays_above_the_rate_distortion_bound(g):
    previous = 1.0
    for bits in range(1, 17):
        distortion = rules.predicted_distortion(g, 2**bits)
        assert 2 ** (-2 * bits / g) <= distortion * (1 + 1e-3) <= previous * (1 + 1e-3)
        previous = distortion


def test_groups_for_aqlm_divide_every_cut_axis():
    shapes = {"q": (576, 576), "k": (576, 192), "up": (576, 1536)}
    assert rules.groups_for_aqlm(shapes, axis="out") == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert rules.groups_for_aqlm({"q": (50, 64)}, axis="in") == [1, 2, 5, 10, 25]
    rule = rules.allocate({"q": (50, 4096)}, 3.0, like=CompressionRule(axis="in"), groups=[5, 10])
    assert rule.group_size in (5, 10)
