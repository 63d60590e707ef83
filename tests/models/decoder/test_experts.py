"""The mixture of experts against loops over positions in float64, and what its clustering rests on."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import fields_of, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from cluscomp_jax import (
    CalibrationConfig,
    ClusterConfig,
    CompressConfig,
    CompressionRule,
    DataConfig,
    FinetuneConfig,
    InputError,
    RecoveryConfig,
    TrainingConfig,
    compress,
    finetune,
    perplexity,
)
from cluscomp_jax.clustering.hessian import collect_hessians, together
from cluscomp_jax.clustering.matrix import decompress
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.inference.decoder import Decoder, generate
from cluscomp_jax.models.decoder import experts, forward
from cluscomp_jax.models.decoder.experts import ExpertsConfig, Routing
from cluscomp_jax.models.model import build_model, parse_model_config
from cluscomp_jax.models.sharding import AXES, sharding_on
from cluscomp_jax.models.source import as_source
from cluscomp_jax.models.streams import Batch

CONFIG = parse_model_config(fields_of("mixtral"))
MODEL = build_model(CONFIG)


def oracle(x: np.ndarray, chosen: np.ndarray, shares: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """The sum over the experts of each position, one after another, float64."""
    out = np.zeros((len(x), kernels.shape[-1]))
    for i, row in enumerate(np.asarray(x, np.float64)):
        for expert, share in zip(chosen[i], shares[i], strict=True):
            out[i] += float(share) * (row @ kernels[expert].astype(np.float64))
    return out


def routing(random: np.random.Generator, m: int, k: int, count: int, *, crowded: bool) -> Routing:
    """A random routing; crowded: all positions choose the last experts, and the others get none."""
    pool = np.arange(count - k, count) if crowded else np.arange(count)
    chosen = np.stack([random.permutation(pool)[:k] for _ in range(m)]).astype(np.int32)
    return Routing(jnp.asarray(chosen), jnp.asarray(random.uniform(0, 1, (m, k)), jnp.float32))


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(2, 9), st.data(), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_mix_is_the_sum_over_the_experts_of_each_position(
    m: int, count: int, data: Any, crowded: bool, seed: int
) -> None:
    k = data.draw(st.integers(1, count))
    random = np.random.default_rng(seed)
    x, kernels = (random.standard_normal(shape).astype(np.float32) for shape in ((m, 5), (count, 5, 3)))
    found = routing(random, m, k, count, crowded=crowded)
    there = jnp.asarray(kernels)
    y = experts.mix(jnp.asarray(x), found, count, lambda expert, rows: rows @ there[expert])
    np.testing.assert_allclose(y, oracle(x, *map(np.asarray, found), kernels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("m", [1, 3, 64])
def test_gradients_are_those_of_all_experts_on_all_positions(m: int) -> None:
    random = np.random.default_rng(m)
    count, k = 4, 2
    x, kernels = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((m, 5), (count, 5, 3)))
    chosen, shares = routing(random, m, k, count, crowded=False)

    def mixed(x: jax.Array, kernels: jax.Array, shares: jax.Array) -> jax.Array:
        run = lambda expert, rows: jnp.tanh(rows @ kernels[expert])  # noqa: E731
        return jnp.sum(jnp.square(experts.mix(x, Routing(chosen, shares), count, run)))

    def dense(x: jax.Array, kernels: jax.Array, shares: jax.Array) -> jax.Array:
        every = jnp.tanh(jnp.einsum("md,edo->meo", x, kernels))
        each = jnp.einsum("mk,mke->me", shares, jax.nn.one_hot(chosen, count))
        return jnp.sum(jnp.square(jnp.einsum("me,meo->mo", each, every)))

    chex.assert_trees_all_close(
        jax.grad(mixed, (0, 1, 2))(x, kernels, shares),
        jax.grad(dense, (0, 1, 2))(x, kernels, shares),
        rtol=1e-4,
        atol=1e-5,
    )


def test_shares_are_probabilities_of_the_most_probable() -> None:
    logits = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1)[:, :3]
    for normalised in (False, True):
        found = experts.route(jnp.asarray(logits), ExpertsConfig(6, 3, normalised))
        want = np.take_along_axis(probabilities, order, axis=1)
        want = want / want.sum(axis=1, keepdims=True) if normalised else want
        np.testing.assert_array_equal(found.chosen, order)
        np.testing.assert_allclose(found.shares, want, rtol=1e-5)


@pytest.mark.parametrize(("count", "each"), [(1, 1), (4, 0), (4, 5), (4, "2"), (2**17, 1)])
def test_experts_that_cannot_be_are_refused(count: Any, each: Any) -> None:
    with pytest.raises(InputError, match="config: "):
        ExpertsConfig(count, each)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_shares"])
def test_an_experts_hessian_is_that_of_its_positions_by_their_shares(name: str) -> None:
    model = build_model(parse_model_config(fields_of(name)))
    mixture, params = model.config.experts, random_params(model.config)
    block, layer_type = as_source(params, model).load_block(0), model.layer_type(0)
    x = np.random.default_rng(2).standard_normal((3, 16, model.config.hidden_size)).astype(np.float32)
    seen: dict[str, tuple[Any, ...]] = {}
    model.block(block, jnp.asarray(x), layer_type=layer_type, observer=lambda name, *found: seen.update({name: found}))
    rows = np.asarray(seen["mlp/experts/0/input"][0], np.float64).reshape(48, -1)
    router = np.asarray(block["mlp"]["router"]["kernel"], np.float64)
    probabilities = np.exp(rows @ router)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    kept = np.where(probabilities >= np.sort(probabilities, axis=1)[:, [-2]], probabilities, 0)
    shares = kept / kept.sum(axis=1, keepdims=True) if mixture.normalised else kept
    every = 0.05 * np.mean(np.sum(shares**2, axis=0)) / 48  # a position, of 5% of what the experts get on average
    groups = [name for name in model.input_groups if "experts" in name]
    found = collect_hessians(model, layer_type, groups, block, [Batch(jnp.asarray(x))])
    assert sorted(found) == sorted(groups)
    for i in range(mixture.count):
        expert = block["mlp"]["experts"][str(i)]
        gate, up = (rows @ np.asarray(expert[f"{name}_proj"]["kernel"], np.float64) for name in ("gate", "up"))
        weights = (shares[:, i] ** 2 + every)[:, None]
        for name, value in (("input", rows), ("hidden", gate / (1 + np.exp(-gate)) * up)):
            want = (weights * value).T @ value / 48
            np.testing.assert_allclose(
                found[f"mlp/experts/{i}/{name}"].hessian, want, rtol=1e-3, atol=1e-5 * np.abs(want).max()
            )


def test_statistics_are_collected_together_up_to_a_size() -> None:
    shapes = MODEL.block_shapes(0)
    inputs = MODEL.independent_groups[2]
    assert together(MODEL, shapes, inputs, drift=True) == [inputs]
    huge = dict.fromkeys(shapes, (2**13, 2**13))
    assert [len(names) for names in together(MODEL, huge, inputs, drift=False)] == [4, 4]
    assert [len(names) for names in together(MODEL, huge, inputs, drift=True)] == [2] * 4
    assert sum(MODEL.independent_groups, ()) == tuple(MODEL.input_groups)


def tiny_run(**cluster: Any) -> CompressConfig:
    how = CalibrationConfig(samples=4, length=16)
    settings = ClusterConfig(iterations=2, refine_rounds=1, **cluster)
    return CompressConfig(model=CONFIG, cluster=settings, tuning=None, calibration=how)


TOKENS = np.random.default_rng(3).integers(0, 96, (4, 16))


def test_the_experts_of_a_block_have_one_form_within_a_budget() -> None:
    params = compress(random_params(CONFIG), tiny_run(bits=3.0), calibration=TOKENS)
    flat = trees.flatten(params)
    forms = {path: (leaf.form, leaf.coding) for path, leaf in flat.items() if isinstance(leaf, CodebookArray)}
    for i in range(CONFIG.num_hidden_layers):
        for name in ("gate", "up", "down"):
            place = f"model/layers/{i}/mlp/experts"
            assert len({forms[f"{place}/{expert}/{name}_proj/kernel"] for expert in range(8)}) == 1
    assert not isinstance(flat["model/layers/0/mlp/router/kernel"], CodebookArray)
    assert len(set(forms.values())) > 1


@pytest.mark.parametrize("tied", ["none", "input"])
def test_compressed_experts_compute_as_decoded_ones(tied: Any) -> None:
    rules = (CompressionRule(group_size=4, num_codes=16),)
    params = compress(random_params(CONFIG), tiny_run(rules=rules, tie_codebooks=tied), calibration=TOKENS)
    want = forward(decompress(params), TOKENS, CONFIG)
    chex.assert_trees_all_close(forward(params, TOKENS, CONFIG), want, rtol=1e-4, atol=1e-4)
    tokens = [
        generate(params, TOKENS[:2, :5], CONFIG, max_new_tokens=6, decode_weights=how) for how in ("once", "call")
    ]
    np.testing.assert_array_equal(*tokens)
    prompts = [TOKENS[0, :5], TOKENS[1, :3]]
    ragged = generate(params, prompts, CONFIG, max_new_tokens=6)
    for row, prompt in zip(ragged, prompts, strict=True):
        np.testing.assert_array_equal(row, generate(params, prompt, CONFIG, max_new_tokens=6))


@pytest.mark.parametrize("others", [r".*/experts/\d+/.*", r".*_proj/kernel", None])
def test_experts_of_several_forms_are_decoded_and_run(others: str | None) -> None:
    rules = [CompressionRule(pattern=r".*/experts/[0-3]/.*", group_size=4, num_codes=16)]
    if others is not None:
        rules.append(CompressionRule(pattern=others, group_size=2, num_codes=8))
    params = compress(random_params(CONFIG), tiny_run(rules=tuple(rules)), calibration=TOKENS)
    want = forward(decompress(params), TOKENS, CONFIG)
    chex.assert_trees_all_close(forward(params, TOKENS, CONFIG), want, rtol=1e-4, atol=1e-4)


def test_a_mesh_is_refused() -> None:
    with pytest.raises(InputError, match="mesh data=1, fsdp=1, tensor=1: a mixture of experts runs on one device"):
        sharding_on(jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3), MODEL)


def test_a_decoder_holds_its_experts_stacked() -> None:
    params = random_params(CONFIG)
    decoder = Decoder.load(as_source(params, MODEL), MODEL, dtype=jnp.float32, decode_weights="call")
    stack = decoder.blocks[0]["mlp"]["experts"]
    assert list(stack) == ["stack"]
    chex.assert_shape(stack["stack"]["gate_proj"]["kernel"], (8, CONFIG.hidden_size, CONFIG.intermediate_size))
    assert experts.stacked(stack) is stack


@pytest.mark.long
def test_experts_are_tuned_recovered_and_finetuned() -> None:
    cluster = ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),), iterations=2, refine_rounds=0)
    cfg = CompressConfig(
        model=CONFIG,
        cluster=cluster,
        tuning=BlockTuningConfig(epochs=2, batch_size=2, validation_samples=0),
        calibration=CalibrationConfig(samples=4, length=16),
        recovery=RecoveryConfig(steps=3),
    )
    original = random_params(CONFIG)
    params = compress(original, cfg, calibration=TOKENS)
    chex.assert_trees_all_equal(params, compress(original, cfg, calibration=TOKENS))
    training = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-2)
    how = FinetuneConfig(model=CONFIG, training=training, data=DataConfig(length=16))
    moved = finetune(params, TOKENS, how, evaluation=TOKENS)
    before, after = (perplexity(each, TOKENS.reshape(-1), CONFIG, context=16).perplexity for each in (params, moved))
    assert after < before
    for path, leaf in trees.flatten(moved).items():
        if isinstance(leaf, CodebookArray):
            np.testing.assert_array_equal(leaf.index, trees.flatten(params)[path].index)
