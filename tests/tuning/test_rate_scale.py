"""Tuning one and the same function whatever the scale of its weights: a rate is a share of what it moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounding import epsilon

import cluscomp_jax
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import PAPER, CompressConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.source import load_all
from cluscomp_jax.runtime.reporter import SilentReporter
from cluscomp_jax.tuning.optimizer import make_optimizer

pytestmark = pytest.mark.long

SCALES = {"an eighth": 8.0, "a 64th": 64.0, "eight times": 0.125}


class Blocks(SilentReporter):
    """Keeps the record of every block."""

    def __init__(self):
        self.records = []

    def record(self, event, **fields):
        if event == "block":
            self.records.append(fields)


def rescaled(params, config, scale):
    """Returns (params, config) of the same function, with kernels, embedding and stream `scale` times smaller."""

    def moved(path, leaf):
        leaf = np.asarray(leaf, np.float32)
        return leaf * scale if "layernorm/" in path else leaf if path.endswith("norm/weight") else leaf / scale

    # The embedding is the head too: what the last norm gives has to grow with it.
    flat = {path: moved(path, leaf) for path, leaf in trees.flatten(params).items()}
    flat["model/norm/weight"] = flat["model/norm/weight"] * scale
    return trees.unflatten(flat), dataclasses.replace(config, rms_norm_eps=config.rms_norm_eps / scale**2)


def run(params, config, tokens, *, seed=0, codes=16, iterations=3):
    # bfloat16 rounds alike at every scale; float16 would round codes below 6e-5 more coarsely.
    cluster = ClusterConfig(
        rules=(CompressionRule(group_size=4, num_codes=codes),), iterations=iterations, codebook_dtype="bfloat16"
    )
    cfg = CompressConfig(
        model=config,
        cluster=cluster,
        calibration=CalibrationConfig(samples=len(tokens), length=tokens.shape[1]),
        seed=seed,
    )
    blocks = Blocks()
    compressed = cluscomp_jax.compress(params, cfg, calibration=tokens, reporter=blocks)
    before = sum(block["loss_before"] for block in blocks.records)
    return compressed, 1 - sum(block["epoch_losses"][-1] for block in blocks.records) / before


@pytest.fixture(scope="module")
def opened(tiny_model):
    opened = cluscomp_jax.open_model(str(tiny_model))
    config = dataclasses.replace(opened.config, num_hidden_layers=2, layer_types=())
    flat = trees.flatten(load_all(opened.source, opened.model))
    dropped = tuple(f"model/layers/{i}/" for i in (2, 3, 4))
    few = {path: leaf for path, leaf in flat.items() if not path.startswith(dropped)}
    return config, trees.unflatten(few)


@pytest.fixture(scope="module")
def unscaled(opened, tiny_train_tokens):
    config, params = opened
    return run(*rescaled(params, config, 1.0), tiny_train_tokens[:1024].reshape(16, 64))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_same_function_gets_the_same_codes_and_the_same_gain(opened, unscaled, tiny_train_tokens, scale):
    config, params = opened
    tokens = tiny_train_tokens[:1024].reshape(16, 64)
    compressed, fall = run(*rescaled(params, config, scale), tokens)
    expected, fall_expected = unscaled
    assert fall_expected > 0.005
    assert fall >= 0.9 * fall_expected
    for path, leaf in trees.flatten(expected["model"]["layers"]["0"]).items():
        if isinstance(leaf, CodebookArray):
            ours = trees.flatten(compressed["model"]["layers"]["0"])[path]
            # A power of two changes no digit but in the underflow of a few sums.
            assert np.mean(np.asarray(ours.index) == np.asarray(leaf.index)) > 0.99, path
            found, wanted = np.asarray(ours.codebook, np.float32) * scale, np.asarray(leaf.codebook, np.float32)
            np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_mean_gain_of_three_seeds_is_that_of_the_model_as_it_is(tiny_model, tiny_train_tokens, scale):
    opened = cluscomp_jax.open_model(str(tiny_model))
    params, tokens = load_all(opened.source, opened.model), tiny_train_tokens[: 32 * 128].reshape(32, 128)

    def mean_fall(scale):
        inputs = rescaled(params, opened.config, scale)
        return np.mean([run(*inputs, tokens, seed=seed, codes=64, iterations=10)[1] for seed in range(3)])

    as_it_is, ours = mean_fall(1.0), mean_fall(scale)
    print(f"fall of the summed block losses: {as_it_is:.4%} as it is, {ours:.4%} scaled by 1 / {scale}")
    assert ours >= 0.9 * as_it_is


def one_step(settings, params, gradients, *, stacked=lambda path: False):
    optimizer = make_optimizer(settings, 10, stacked=stacked)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return updates


def test_a_first_step_is_the_rate_times_the_root_mean_square():
    """Adam's first update is the sign of the gradient."""
    params = {"a/b": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "c": jnp.array([[1.0, 1.0], [7.0, 7.0]])}
    gradients = jax.tree.map(jnp.ones_like, params)
    settings = BlockTuningConfig(learning_rate=0.1, schedule="constant")
    updates = one_step(settings, params, gradients, stacked=lambda path: path == "c")
    np.testing.assert_allclose(updates["a/b"], -0.1 * 2.5, rtol=1e-5)
    np.testing.assert_allclose(updates["c"], [[-0.1, -0.1], [-0.7, -0.7]], rtol=1e-5)


def test_decay_is_a_share_of_each_weight():
    params = {"a": jnp.array([3.0, 4.0, 0.0, 0.0])}
    settings = BlockTuningConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    updates = one_step(settings, params, {"a": jnp.zeros(4)})
    np.testing.assert_allclose(updates["a"], [-0.15, -0.2, 0.0, 0.0], rtol=16 * epsilon())


@pytest.mark.parametrize("settings", [PAPER.tuning, TrainingConfig(relative_rate=False)])
def test_an_absolute_rate_is_adamw_as_optax_has_it(settings):
    params = {"a": jnp.array([[3.0, 4.0], [0.5, -2.0]])}
    gradients = {"a": jnp.array([[0.1, -2.0], [0.0, 3.0]])}
    settings = dataclasses.replace(settings, schedule="constant", warmup_fraction=0.0)
    oracle = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
    expected, _ = oracle.update(gradients, oracle.init(params), params)
    found = one_step(settings, params, gradients)["a"]
    np.testing.assert_allclose(found, expected["a"], rtol=4 * np.finfo(np.float32).eps)


def test_the_paper_keeps_its_absolute_rate():
    assert (PAPER.tuning.learning_rate, PAPER.tuning.relative_rate) == (0.005, False)
    assert BlockTuningConfig().relative_rate
    assert TrainingConfig().relative_rate


def test_an_array_of_zeros_moves_by_an_absolute_rate_alone():
    settings = BlockTuningConfig(learning_rate=0.1, schedule="constant")
    absolute = dataclasses.replace(settings, relative_rate=False)
    params, gradients = {"a": jnp.zeros(3)}, {"a": jnp.ones(3)}
    np.testing.assert_allclose(one_step(settings, params, gradients)["a"], 0.0, atol=16 * epsilon())
    np.testing.assert_allclose(one_step(absolute, params, gradients)["a"], -0.1, rtol=1e-5)
