"""Bits spent unevenly: the choice against every choice there is, and what a budget promises."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.clustering import bit_allocation
from cluscomp_jax.clustering.bit_allocation import allocate_unevenly, check_reachable, tempered
from cluscomp_jax.clustering.rules import allocate, predicted_distortion
from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core.coding import stored_bits
from cluscomp_jax.errors import InputError

SHAPES = {
    "layers/0/q/kernel": (64, 64),
    "layers/0/up/kernel": (64, 256),
    "layers/1/q/kernel": (64, 64),
    "layers/1/up/kernel": (64, 256),
}
LARGE = {
    f"layers/{i}/{name}/kernel": shape for i in range(4) for name, shape in (("q", (512, 512)), ("up", (512, 2048)))
}
ANY = CompressionRule()
POOLS = (None, {path: path.split("/")[1] for path in SHAPES})


def spent(shapes, rules, pools=None):
    """Bits per weight, a codebook counted once for all of a pool that are cut alike."""
    bits, seen = 0, set()
    for path, rule in rules.items():
        codebook = (path if pools is None else pools[path], rule.group_size, rule.num_codes)
        bits += stored_bits(rule.form(shapes[path]), own=codebook not in seen)
        seen.add(codebook)
    return bits / sum(math.prod(shape) for shape in shapes.values())


def predicted(rules, sensitivities):
    return sum(
        sensitivities[path] * predicted_distortion(rule.group_size, rule.num_codes) for path, rule in rules.items()
    )


@pytest.mark.parametrize("pools", POOLS, ids=["own", "shared"])
@pytest.mark.parametrize("bits", [1.3, 2.0, 3.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_choice_within_the_budget_predicts_less(monkeypatch, bits, seed, pools):
    """Every combination of a few settings, tried out."""
    monkeypatch.setattr(bit_allocation, "_BY_HEART", 0.0)
    monkeypatch.setattr(bit_allocation, "_GROUPS", (1, 2, 3, 4))
    monkeypatch.setattr(bit_allocation, "_INDEX_BITS", range(2, 6))
    monkeypatch.setattr(bit_allocation, "_LEAST", 0.0)
    monkeypatch.setattr(bit_allocation, "_ABOVE", math.inf)
    costs = {path: 10.0 ** ((i * 7 + seed * 3) % 5) for i, path in enumerate(SHAPES)}
    found = allocate_unevenly(SHAPES, costs, bits, like=ANY, pools=pools)
    assert spent(SHAPES, found, pools) <= bits
    offers = [CompressionRule(group_size=g, num_codes=2**width) for g in range(1, 5) for width in range(2, 6)]
    least = math.inf
    for rules in itertools.product(offers, repeat=len(SHAPES)):
        chosen = dict(zip(SHAPES, rules, strict=True))
        if spent(SHAPES, chosen, pools) <= bits:
            least = min(least, predicted(chosen, costs))
    assert predicted(found, costs) == pytest.approx(least, rel=1e-5)


def test_sharing_leaves_more_of_a_budget_for_indices():
    costs = {path: float(math.prod(shape)) for path, shape in SHAPES.items()}
    own, shared = (allocate_unevenly(SHAPES, costs, 3.0, like=ANY, pools=pools) for pools in POOLS)
    assert predicted(shared, costs) < 0.98 * predicted(own, costs)
    assert spent(SHAPES, shared, POOLS[1]) <= 3.0 < spent(SHAPES, shared, None)


def test_many_codes_for_few_vectors_are_worth_more_than_theory_says():
    """Two matrices of the same cost: the small one gains by codes what the large one does not."""
    shapes = {"a/kernel": (64, 64), "b/kernel": (64, 65536)}

    def predicted_loss(path, num_codes):
        problem = bit_allocation._Problem(shapes, [], {}, "out")
        return bit_allocation._predicted_loss(problem, dict.fromkeys(shapes, 1.0), [path], 4, num_codes)

    assert predicted_loss("a/kernel", 256) < 0.9 * predicted_loss("b/kernel", 256)
    assert predicted_loss("b/kernel", 256) == pytest.approx(predicted_distortion(4, 256), rel=1e-2)


def test_no_matrix_gets_less_than_half_the_budget_or_much_more():
    """Whatever it costs: there the prediction fails."""
    costs = {path: 10.0 ** (8 * i) for i, path in enumerate(LARGE)}
    found = allocate_unevenly(LARGE, costs, 2.6, like=ANY)
    rates = [math.log2(rule.num_codes) / rule.group_size for rule in found.values()]
    assert 1.3 <= min(rates) < 1.5
    assert 3.5 < max(rates) <= 4.1


def test_costs_are_roots_of_sensitivities_per_weight():
    found = tempered({"a": 4.0, "b": 4.0, "c": 0.0}, {"a": (2, 8), "b": (32, 32), "c": (3, 3)})
    assert found == {"a": 16 * math.sqrt(4 / 16), "b": 1024 * math.sqrt(4 / 1024), "c": 0.0}


@given(bits=st.floats(0.6, 9.0), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_the_budget_holds_and_even_spending_is_never_better(bits, seed):
    sensitivities = {path: 1.0 + (hash((path.count("1"), i, seed)) % 100) for i, path in enumerate(LARGE)}
    found = allocate_unevenly(LARGE, sensitivities, bits, like=ANY)
    assert spent(LARGE, found) <= bits
    even = allocate(LARGE, bits)
    power = dict.fromkeys(
        LARGE, CompressionRule(group_size=even.group_size, num_codes=2 ** int(math.log2(even.num_codes)))
    )
    if even.group_size in (1, 2, 3, 4, 6, 8) and even.num_codes >= 4:
        assert predicted(found, sensitivities) <= predicted(power, sensitivities) * 1.01


def test_what_counts_more_gets_more_bits_and_kernels_stay_together():
    sensitivities = dict.fromkeys(LARGE, 1.0) | {path: 100.0 for path in LARGE if "/q/" in path}
    found = allocate_unevenly(LARGE, sensitivities, 2.5, like=CompressionRule(pattern="x", axis="in"))
    assert {(rule.pattern, rule.axis) for rule in found.values()} == {("x", "in")}
    assert len({found[path] for path in LARGE if "/q/" in path}) == 1
    rate = {
        name: math.log2(rule.num_codes) / rule.group_size
        for path, rule in found.items()
        for name in [path.split("/")[2]]
    }
    assert rate["q"] > rate["up"]
    first = dict.fromkeys(LARGE, 1.0) | {path: 100.0 for path in LARGE if "/0/" in path}
    by_matrix = allocate_unevenly(LARGE, first, 2.5, like=ANY)
    q = [by_matrix[f"layers/{i}/q/kernel"] for i in range(2)]
    assert math.log2(q[0].num_codes) / q[0].group_size > math.log2(q[1].num_codes) / q[1].group_size


def test_a_budget_that_nothing_reaches_names_the_least():
    with pytest.raises(InputError, match=r"bits is 0\.1; the least that mixed settings reach on this model is 0\.2"):
        check_reachable(LARGE, 0.1, axis="out")


@pytest.mark.parametrize("pools", POOLS, ids=["own", "shared"])
def test_what_is_said_to_be_the_least_is_reached_and_less_is_not(pools):
    with pytest.raises(InputError) as error:
        check_reachable(SHAPES, 0.2, axis="out", pools=pools)
    least = float(str(error.value).split()[-1])
    check_reachable(SHAPES, least, axis="out", pools=pools)
    found = allocate_unevenly(SHAPES, dict.fromkeys(SHAPES, 1.0), least, like=ANY, pools=pools)
    assert least - 0.002 < spent(SHAPES, found, pools) <= least
