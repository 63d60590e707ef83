"""Training after a teacher: the mixed loss against float64, its gradient against plain autodiff, and whole runs."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import llama_oracle
import numpy as np
import pytest
from finetuning_problem import HELD_OUT, ROWS, Recorder
from training_models import CONFIG, MODEL, batch, compressed_params

from cluscomp_jax import llama
from cluscomp_jax.clustering.matrix import decompress
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.training import DistillationConfig, TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.losses import divergence
from cluscomp_jax.errors import InputError
from cluscomp_jax.finetuning import TeacherSource, as_batches, finetune, fingerprint
from cluscomp_jax.models.source import DictSource
from cluscomp_jax.training import load_teacher, split_params, summed_loss
from cluscomp_jax.training import step as step_module

TEACHER_CONFIG = dataclasses.replace(CONFIG, hidden_size=24, intermediate_size=40, num_attention_heads=4)
TEACHER_MODEL = llama.build(TEACHER_CONFIG)
TEACHER = llama.init_params(TEACHER_CONFIG, jax.random.key(5))
MIXED = TrainingConfig(distillation=DistillationConfig(weight=0.3, temperature=2.0))


def log_softmax64(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def oracle(params, tokens, loss_mask, *, weight, temperature):
    """The mixed loss in float64, by an implementation of the decoder that shares no code with ours."""
    models = [(params, CONFIG), (TEACHER, TEACHER_CONFIG)]
    wide = [(trees.map_by_path(lambda _, leaf: np.asarray(leaf, np.float64), p), config) for p, config in models]
    total = 0.0
    for row, counts in zip(tokens, loss_mask, strict=True):
        ours, theirs = (llama_oracle.logits(p, row, config, [None] * config.num_hidden_layers) for p, config in wide)
        expected, found = log_softmax64(theirs / temperature), log_softmax64(ours / temperature)
        apart = np.sum(np.exp(expected) * (expected - found), axis=-1)
        nll = -log_softmax64(ours)[np.arange(len(row) - 1), row[1:]]
        total += np.sum(((1 - weight) * nll + weight * temperature**2 * apart[:-1])[counts[1:]])
    return total


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(DictSource(TEACHER, TEACHER_MODEL), TEACHER_MODEL)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_the_mixed_loss_is_that_of_float64(teacher, weight, temperature):
    params = compressed_params()
    tokens, loss_mask = batch()
    trained, frozen, layout = split_params(DictSource(params, MODEL), MODEL, (".*/codebook",))
    settings = TrainingConfig(distillation=DistillationConfig(weight=weight, temperature=temperature))
    found = summed_loss(trained, frozen, tokens, loss_mask, teacher, layout=layout, settings=settings)
    expected = oracle(decompress(params), tokens, loss_mask, weight=weight, temperature=temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("remat_policy", ["all", "cheap"])
def test_the_gradient_is_that_of_all_logits_at_once(monkeypatch, teacher, remat_policy):
    dense = decompress(compressed_params(dtype=np.float32))
    tokens, loss_mask = batch()
    theirs = llama.forward(TEACHER, tokens, TEACHER_CONFIG)[:, :-1]

    def plain(params):
        ours = llama.forward(params, tokens, CONFIG)[:, :-1]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(ours), tokens[:, 1:, None], axis=-1)[..., 0]
        expected, found = jax.nn.log_softmax(theirs / 2), jax.nn.log_softmax(ours / 2)
        apart = jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)
        return jnp.sum(jnp.where(loss_mask[:, 1:], 0.7 * nll + 1.2 * apart, 0.0))

    expected = trees.flatten(jax.grad(plain)(dense))
    monkeypatch.setattr(step_module, "HEAD_POSITIONS", 12)  # 3 of the 8 positions of each of 4 rows: padded
    trained, frozen, layout = split_params(DictSource(dense, MODEL), MODEL, (".*",))
    settings = dataclasses.replace(MIXED, remat_policy=remat_policy)
    found = jax.grad(summed_loss)(trained, frozen, tokens, loss_mask, teacher, layout=layout, settings=settings)
    for name, value in trees.iterate(found):
        group, _, relative = name.partition("/")
        paths = [relative] if group == "rest" else [f"model/layers/{i}/{relative}" for i in range(3)]
        each = [expected[path] for path in paths]
        np.testing.assert_allclose(value, each[0] if group == "rest" else np.stack(each), rtol=5e-4, atol=5e-5)


def test_divergence_from_oneself_is_zero_and_a_constant_changes_nothing():
    logits = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    np.testing.assert_allclose(divergence(logits, logits + 5, 3.0), 0, atol=1e-6)
    assert float(divergence(logits[0], logits[1], 1.0)) > 0.1


CFG = FinetuneConfig(
    model=CONFIG,
    training=TrainingConfig(
        steps=6, batch_size=2, learning_rate=0.02, distillation=DistillationConfig(weight=0.8, temperature=2.0)
    ),
    save_every=2,
)


def follow(cfg=CFG, **options):
    given = {"teacher": TEACHER, "teacher_config": TEACHER_CONFIG} | options
    return finetune(compressed_params(), ROWS, cfg, **given)


def test_a_student_comes_closer_to_its_teacher():
    logits = llama.forward(TEACHER, ROWS.tokens, TEACHER_CONFIG)
    long = dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, steps=60))
    before, after = (
        float(jnp.mean(divergence(logits, llama.forward(params, ROWS.tokens, CONFIG), 1.0)))
        for params in (compressed_params(), follow(long))
    )
    assert after < 0.7 * before


def test_a_resumed_run_with_a_teacher_ends_in_the_same_bits(tmp_path):
    whole = Recorder()
    expected = follow(evaluation=HELD_OUT, reporter=whole)
    with pytest.raises(KeyboardInterrupt):
        follow(evaluation=HELD_OUT, state_dir=tmp_path / "s", reporter=Recorder(5))
    resumed = Recorder()
    found = follow(evaluation=HELD_OUT, state_dir=tmp_path / "s", reporter=resumed)
    chex.assert_trees_all_equal(trees.flatten(found), trees.flatten(expected))
    assert resumed.records == whole.records


def test_the_fingerprint_knows_the_teacher_and_how_it_is_followed():
    source = DictSource(compressed_params(), MODEL)

    def digest(cfg=CFG, teacher=TEACHER, model=TEACHER_MODEL):
        followed = TeacherSource(DictSource(teacher, model), model)
        return fingerprint(source, cfg, as_batches(ROWS, cfg, MODEL), None, followed).digest

    other = trees.map_by_path(lambda _, leaf: leaf * 1.5, TEACHER)
    hotter = dataclasses.replace(CFG.training, distillation=DistillationConfig(weight=0.8, temperature=3.0))
    eps = llama.build(dataclasses.replace(TEACHER_CONFIG, rms_norm_eps=1e-3))
    found = {digest(), digest(teacher=other), digest(dataclasses.replace(CFG, training=hotter)), digest(model=eps)}
    assert len(found) == 4
    assert digest() == digest()


@pytest.mark.parametrize(
    ("options", "cfg", "text"),
    [
        ({"teacher": None, "teacher_config": None}, CFG, "distillation is set, but there is no teacher"),
        ({}, FinetuneConfig(model=CONFIG), "distillation is not set"),
        (
            {"teacher_config": dataclasses.replace(TEACHER_CONFIG, vocab_size=24)}
            | {"teacher": llama.init_params(dataclasses.replace(TEACHER_CONFIG, vocab_size=24), jax.random.key(0))},
            CFG,
            "the teacher's vocabulary has 24 tokens, the model's 23",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options, cfg, text):
    with pytest.raises(InputError, match=text):
        follow(cfg, **options)


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"weight": 1.1}, "weight is 1.1"), ({"weight": -0.1}, "weight"), ({"temperature": 0.0}, "temperature is 0.0")],
)
def test_settings_out_of_range_are_refused(fields, text):
    with pytest.raises(InputError, match=text):
        DistillationConfig(**fields)
