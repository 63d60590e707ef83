"""A budget that is spent to the end, against a linear programme and the shapes of real models."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog

import cluscomp_jax
from cluscomp_jax.clustering.bit_allocation import (
    allocate_bits,
    distortion_of,
    index_rate,
    offers,
    tempered,
)
from cluscomp_jax.clustering.resolve import rules_by_block
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core.coding import stored_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import build_model

SMOLLM2 = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576), "gate": (576, 1536), "up": (576, 1536),
           "down": (1536, 576)}  # fmt: skip
LLAMA_7B = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
LIKE = CompressionRule()


def model(block: dict[str, tuple[int, int]], blocks: int) -> dict[str, tuple[int, int]]:
    return {f"{i}/{name}": shape for i in range(blocks) for name, shape in block.items()}


def projection(path: str) -> str:
    return path.partition("/")[2]


def weights(shapes: dict[str, tuple[int, int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def spent(shapes: dict[str, tuple[int, int]], rules: dict[str, CompressionRule]) -> float:
    return sum(stored_bits(rules[path].form(shape), rules[path].coding) for path, shape in shapes.items()) / weights(
        shapes
    )


def error(shapes: dict[str, tuple[int, int]], rules: dict[str, CompressionRule]) -> float:
    """The mean predicted error of a weight."""
    return sum(
        math.prod(shape) * distortion_of((rules[path].group_size, rules[path].num_codes, rules[path].step_bits))
        for path, shape in shapes.items()
    ) / weights(shapes)


@pytest.mark.parametrize("coding", ["auto", "trellis", "plain"])
@pytest.mark.parametrize("bits", [1.2, 2.1, 2.5, 3, 3.5, 4, 4.4])
@pytest.mark.parametrize(("block", "blocks"), [(SMOLLM2, 30), (LLAMA_7B, 32)])
def test_the_budget_is_spent_and_never_exceeded(block, blocks, bits, coding) -> None:
    shapes = model(block, blocks)
    rules = allocate_bits(shapes, bits, like=LIKE, coding=coding, projection=projection)
    assert 0.99 * bits <= spent(shapes, rules) <= bits
    # Few blocks differ from the one before: at most one change a projection and step.
    blocks_of = [tuple(rules[f"{i}/{name}"] for name in block) for i in range(blocks)]
    assert sum(a != b for a, b in itertools.pairwise(blocks_of)) <= 4


@pytest.mark.parametrize("bits", [1.3, 2.1, 2.7, 3.3, 4.2])
def test_no_mixture_predicts_much_less(bits: float) -> None:
    """The bound lets every matrix be cut into parts of any settings: a linear programme over all of them."""
    shapes = model(SMOLLM2, 4)
    rules = allocate_bits(shapes, bits, like=LIKE, projection=projection)
    choices = offers("auto")
    cost, size = [], []
    for shape in shapes.values():
        for g, n, step_bits in choices:
            rule = CompressionRule(group_size=g, num_codes=n, step_bits=step_bits)
            size.append(stored_bits(rule.form(shape), rule.coding) / weights(shapes))
            cost.append(distortion_of((g, n, step_bits)) * math.prod(shape) / weights(shapes))
    one_each = np.kron(np.eye(len(shapes)), np.ones(len(choices)))
    bound = linprog(cost, A_ub=[size], b_ub=[bits], A_eq=one_each, b_eq=np.ones(len(shapes)))
    assert bound.fun <= error(shapes, rules) * (1 + 1e-9)
    # What is left over is less than one step of one matrix, whose error at most halves.
    assert error(shapes, rules) <= bound.fun * (1 + 0.5 * max(map(math.prod, shapes.values())) / weights(shapes))


def test_more_bits_never_predict_more_error() -> None:
    shapes = model(SMOLLM2, 6)
    errors = [
        error(shapes, allocate_bits(shapes, bits, like=LIKE, projection=projection)) for bits in np.arange(1, 4.5, 0.25)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_blocks_that_must_be_alike_are() -> None:
    shapes = model(SMOLLM2, 5)
    rules = allocate_bits(shapes, 2.3, like=LIKE, projection=projection, alike=True)
    assert all(rules[path] == rules[f"0/{projection(path)}"] for path in shapes)
    assert 0.9 * 2.3 <= spent(shapes, rules) <= 2.3


def test_the_rule_is_kept_but_for_its_codes() -> None:
    like = CompressionRule(pattern=".*/q", axis="in")
    rules = allocate_bits({"0/q": (576, 576)}, 2.2, like=like, coding="trellis")
    assert rules["0/q"].pattern == ".*/q"
    assert rules["0/q"].axis == "in"
    assert rules["0/q"].step_bits is not None


def test_a_budget_below_all_settings_names_the_least() -> None:
    shapes = model(SMOLLM2, 2)
    with pytest.raises(InputError, match=r"bits is 0\.3; the least that trellis codes reach on this model is 0\.5\d\d"):
        allocate_bits(shapes, 0.3, like=LIKE, coding="trellis")
    allocate_bits(shapes, 0.55, like=LIKE, coding="trellis")


def test_a_run_spends_its_budget_on_trellises(tiny_model) -> None:
    opened = cluscomp_jax.open_model(tiny_model)
    cfg = CompressConfig(model=opened.config, cluster=ClusterConfig(bits=2.4, coding="trellis", iterations=2))
    compressed = cluscomp_jax.compress(opened.source, dataclasses.replace(cfg, tuning=None))
    report = cluscomp_jax.size_report(compressed)
    assert 0.99 * 2.4 <= report.bits_per_weight <= 2.4
    assert all(matrix.step_bits is not None for matrix in report.matrices)


def test_blocks_that_are_stacked_get_the_same_trellises(tiny_model) -> None:
    opened = cluscomp_jax.open_model(tiny_model)
    cfg = CompressConfig(model=opened.config, cluster=ClusterConfig(bits=2.4, coding="trellis"))
    blocks = rules_by_block(build_model(opened.config), cfg, alike=True)
    assert all(block == blocks[0] for block in blocks)


COSTS = {"q": 1.0, "k": 3.0, "v": 9.0, "o": 2.0, "gate": 0.5, "up": 0.7, "down": 1.5}


def unequal(shapes: dict[str, tuple[int, int]]) -> dict[str, float]:
    """A cost of a weight's error that grows with the block and depends on the projection."""
    return {
        path: COSTS[projection(path)] * (1 + int(path.partition("/")[0])) * math.prod(shape)
        for path, shape in shapes.items()
    }


def rate(rule: CompressionRule) -> float:
    return index_rate((rule.group_size, rule.num_codes, rule.step_bits))


@pytest.mark.parametrize("coding", ["auto", "trellis", "plain"])
@pytest.mark.parametrize("bits", [1.3, 2.1, 2.7, 3.3, 4.2])
def test_with_costs_no_mixture_predicts_much_less(bits: float, coding: str) -> None:
    """As above, of the settings that costs allow: from half the index bits of the budget to 1.5 above it."""
    shapes = model(SMOLLM2, 4)
    costs = unequal(shapes)
    rules = allocate_bits(shapes, bits, like=LIKE, coding=coding, costs=costs, projection=projection)
    assert 0.99 * bits <= spent(shapes, rules) <= bits
    assert all(bits / 2 <= rate(rule) <= bits + 1.5 for rule in rules.values())
    choices = [offer for offer in offers(coding) if bits / 2 <= index_rate(offer) <= bits + 1.5]
    cost, size = [], []
    for path, shape in shapes.items():
        for g, n, step_bits in choices:
            rule = CompressionRule(group_size=g, num_codes=n, step_bits=step_bits)
            size.append(stored_bits(rule.form(shape), rule.coding) / weights(shapes))
            cost.append(distortion_of((g, n, step_bits)) * costs[path] / weights(shapes))
    one_each = np.kron(np.eye(len(shapes)), np.ones(len(choices)))
    bound = linprog(cost, A_ub=[size], b_ub=[bits], A_eq=one_each, b_eq=np.ones(len(shapes)))
    found = sum(
        costs[path] * distortion_of((rule.group_size, rule.num_codes, rule.step_bits)) for path, rule in rules.items()
    ) / weights(shapes)
    assert bound.fun <= found * (1 + 1e-9)
    assert found <= bound.fun * 1.03


def test_what_counts_more_gets_more_bits() -> None:
    shapes = model(SMOLLM2, 3)
    rules = allocate_bits(shapes, 2.6, like=LIKE, costs=unequal(shapes), projection=projection)
    assert rate(rules["2/v"]) >= rate(rules["0/v"]) > rate(rules["0/gate"])
    assert rate(rules["2/q"]) > rate(rules["0/q"])


def test_no_matrix_gets_less_than_half_the_budget_or_much_more_whatever_it_costs() -> None:
    shapes = model(SMOLLM2, 4)
    costs = {path: 10.0 ** (3 * i) for i, path in enumerate(shapes)}
    rates = [rate(rule) for rule in allocate_bits(shapes, 2.6, like=LIKE, costs=costs).values()]
    assert 1.3 <= min(rates) <= 1.5
    assert 3.5 <= max(rates) <= 4.1


def test_costs_are_roots_of_sensitivities_per_weight() -> None:
    found = tempered({"a": 4.0, "b": 4.0, "c": 0.0}, {"a": (2, 8), "b": (32, 32), "c": (3, 3)})
    assert found == {"a": 16 * math.sqrt(4 / 16), "b": 1024 * math.sqrt(4 / 1024), "c": 0.0}


def test_sensitivities_of_zero_leave_a_valid_choice() -> None:
    shapes = model(SMOLLM2, 2)
    rules = allocate_bits(shapes, 2.1, like=LIKE, costs=dict.fromkeys(shapes, 0.0))
    assert spent(shapes, rules) <= 2.1
