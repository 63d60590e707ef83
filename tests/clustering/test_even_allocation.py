"""A budget that is spent evenly, against a linear programme and the shapes of real models."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog

import cluscomp_jax
from cluscomp_jax.clustering.even_allocation import allocate_evenly, distortion_of, offers
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
    rules = allocate_evenly(shapes, bits, like=LIKE, coding=coding, projection=projection)
    assert 0.99 * bits <= spent(shapes, rules) <= bits
    # Few blocks differ from the one before: at most one change a projection and step.
    blocks_of = [tuple(rules[f"{i}/{name}"] for name in block) for i in range(blocks)]
    assert sum(a != b for a, b in itertools.pairwise(blocks_of)) <= 4


@pytest.mark.parametrize("bits", [1.3, 2.1, 2.7, 3.3, 4.2])
def test_no_mixture_predicts_much_less(bits: float) -> None:
    """The bound lets every matrix be cut into parts of any settings: a linear programme over all of them."""
    shapes = model(SMOLLM2, 4)
    rules = allocate_evenly(shapes, bits, like=LIKE, projection=projection)
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
        error(shapes, allocate_evenly(shapes, bits, like=LIKE, projection=projection))
        for bits in np.arange(1, 4.5, 0.25)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_blocks_that_must_be_alike_are() -> None:
    shapes = model(SMOLLM2, 5)
    rules = allocate_evenly(shapes, 2.3, like=LIKE, projection=projection, alike=True)
    assert all(rules[path] == rules[f"0/{projection(path)}"] for path in shapes)
    assert 0.9 * 2.3 <= spent(shapes, rules) <= 2.3


def test_the_rule_is_kept_but_for_its_codes() -> None:
    like = CompressionRule(pattern=".*/q", axis="in")
    rules = allocate_evenly({"0/q": (576, 576)}, 2.2, like=like, coding="trellis")
    assert rules["0/q"].pattern == ".*/q"
    assert rules["0/q"].axis == "in"
    assert rules["0/q"].step_bits is not None


def test_a_budget_below_all_settings_names_the_least() -> None:
    shapes = model(SMOLLM2, 2)
    with pytest.raises(InputError, match=r"bits is 0\.3; the least that trellis codes reach on this model is 0\.5\d\d"):
        allocate_evenly(shapes, 0.3, like=LIKE, coding="trellis")
    allocate_evenly(shapes, 0.55, like=LIKE, coding="trellis")


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
