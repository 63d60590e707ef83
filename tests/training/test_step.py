"""The loss of a whole model, its gradient, and one optimiser step: against float64, and against plain autodiff."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import llama_oracle
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from training_models import BF16, CONFIG, MODEL, batch, compressed_params

from cluscomp_jax.clustering.matrix import decompress
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.source import DictSource
from cluscomp_jax.training import (
    init_state,
    merge_params,
    round_masters,
    split_params,
    split_shapes,
    summed_loss,
    train_step,
)
from cluscomp_jax.training import step as step_module


def split(params, trainable=(".*/codebook",)):
    return split_params(DictSource(params, MODEL), MODEL, trainable)


def oracle_loss(params, tokens, loss_mask):
    """Summed -log p in float64, by an implementation that shares no code with ours."""
    dense = trees.map_by_path(lambda _, leaf: np.asarray(leaf, np.float64), params)
    total = 0.0
    for row, counts in zip(tokens, loss_mask, strict=True):
        logits = llama_oracle.logits(dense, row, CONFIG, [None] * CONFIG.num_hidden_layers)
        for t in range(1, len(row)):
            if counts[t]:
                total += np.log(np.sum(np.exp(logits[t - 1]))) - logits[t - 1, row[t]]
    return total


def dense_float64(params):
    """Decoded by indexing, float64; compressed kernels apart, to be decoded anew from changed codebooks."""

    def one(leaf):
        if not isinstance(leaf, CodebookArray):
            return np.asarray(leaf, np.float64)
        return decode64(np.asarray(leaf.codebook, np.float64), leaf)

    return trees.map_by_path(lambda _, leaf: one(leaf), params)


def decode64(codebook, leaf):
    d_in, d_out = leaf.shape
    rows = codebook[np.asarray(leaf.index)]
    whole = rows.reshape(d_in, -1) if leaf.axis == "out" else rows.transpose(0, 2, 1).reshape(-1, d_out)
    return whole[:d_in, :d_out]


@pytest.mark.long
def test_inputs_kept_on_the_host_change_no_bit():
    tokens, loss_mask = batch()
    trained, frozen, layout = split(compressed_params(odd_block=1))
    results = []
    for offload in (False, True):
        settings = TrainingConfig(offload_inputs=offload)
        loss = partial(summed_loss, layout=layout, settings=settings)
        program = jax.jit(jax.value_and_grad(loss)).trace(trained, frozen, tokens, loss_mask)
        assert ("<host>" in str(program.jaxpr)) is offload
        results.append(program.lower().compile()(trained, frozen, tokens, loss_mask))
    chex.assert_trees_all_equal(*results)


def test_shapes_are_split_as_arrays_are():
    params = compressed_params(odd_block=1)
    source = DictSource(params, MODEL)
    trained, frozen, layout = split_params(source, MODEL, (".*/codebook", ".*norm/weight"))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    abstract = DictSource(shapes, MODEL)
    blocks = [abstract.load_block(i) for i in range(MODEL.num_blocks)]
    found = split_shapes(blocks, abstract.load_outer(), MODEL, (".*/codebook", ".*norm/weight"))
    chex.assert_trees_all_equal_shapes_and_dtypes((trained, frozen), found[:2])
    assert found[2] == layout


def test_the_loss_is_that_of_float64():
    params = compressed_params(odd_block=1)
    tokens, loss_mask = batch()
    trained, frozen, layout = split(params)
    assert [(span.first, span.count) for span in layout.spans] == [(0, 1), (1, 1), (2, 1)]
    ours = summed_loss(trained, frozen, tokens, loss_mask, layout=layout, settings=TrainingConfig())
    assert float(ours) == pytest.approx(oracle_loss(dense_float64(params), tokens, loss_mask), rel=1e-5)


@pytest.mark.parametrize("odd_block", [None, 1])
def test_gradients_of_codebooks_are_those_of_float64_finite_differences(odd_block):
    params = compressed_params(odd_block=odd_block, dtype=np.float32)
    tokens, loss_mask = batch(rows=1, length=6)
    trained, frozen, layout = split(params)
    gradient = jax.grad(summed_loss)(trained, frozen, tokens, loss_mask, layout=layout, settings=TrainingConfig())
    dense, flat = dense_float64(params), trees.flatten(params)
    rng = np.random.default_rng(1)
    for span in layout.spans:
        for name, stacked in trees.iterate(gradient[span.name]):
            place = int(rng.integers(span.count))
            path = f"model/layers/{span.first + place}/{name.removesuffix('/codebook')}"
            direction = rng.standard_normal(stacked.shape[1:])
            losses = []
            for sign in (1, -1):
                codebook = np.asarray(flat[path].codebook, np.float64) + sign * 1e-5 * direction
                moved = trees.flatten(dense) | {path: decode64(codebook, flat[path])}
                losses.append(oracle_loss(trees.unflatten(moved), tokens, loss_mask))
            slope = (losses[0] - losses[1]) / 2e-5
            # Of the direction's length, not of the slope: a random direction may be nearly flat.
            scale = np.linalg.norm(stacked[place])
            assert abs(float(np.sum(stacked[place] * direction)) - slope) <= 1e-3 * scale, path


def test_scanned_blocks_and_chunked_logits_change_nothing(monkeypatch):
    """Against the plain forward pass and all logits at once, differentiated by JAX as they stand."""
    params = compressed_params(dtype=np.float32)
    tokens, loss_mask = batch()

    def plain(params):
        from cluscomp_jax import llama

        logp = jax.nn.log_softmax(llama.forward(params, tokens, CONFIG)[:, :-1])
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(loss_mask[:, 1:], chosen, 0.0))

    dense = decompress(params)
    expected = trees.flatten(jax.grad(plain)(dense))
    monkeypatch.setattr(step_module, "HEAD_POSITIONS", 5)  # 32 positions: the last chunk is padded
    trained, frozen, layout = split(dense, (".*",))
    assert trees.flatten(frozen) == {}
    (span,) = layout.spans
    found = jax.grad(summed_loss)(trained, frozen, tokens, loss_mask, layout=layout, settings=TrainingConfig())
    for name, value in trees.iterate(found):
        group, _, relative = name.partition("/")
        if group == "rest":
            np.testing.assert_allclose(value, expected[relative], rtol=2e-4, atol=2e-5)
        else:
            each = [expected[f"model/layers/{i}/{relative}"] for i in range(span.count)]
            np.testing.assert_allclose(value, np.stack(each), rtol=2e-4, atol=2e-5)


def test_logits_of_a_whole_batch_never_exist(monkeypatch):
    monkeypatch.setattr(step_module, "HEAD_POSITIONS", 128)
    trained, frozen, layout = split(compressed_params())
    settings = TrainingConfig()
    tokens, loss_mask = (array[None] for array in batch(rows=64, length=9))
    step = partial(train_step.__wrapped__, layout=layout, settings=settings)
    jaxpr = jax.make_jaxpr(step)(init_state(trained, settings=settings), frozen, tokens, loss_mask).jaxpr
    shapes = [v.aval.shape for v in outputs(jaxpr)]
    assert (64, 2, CONFIG.vocab_size) in shapes
    logits = [shape for shape in shapes if shape[-1:] == (CONFIG.vocab_size,)]
    assert max(np.prod(shape) for shape in logits) == 128 * CONFIG.vocab_size


def outputs(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from outputs(inner)


def run_steps(params, settings, *, count=6, rows=4):
    trained, frozen, layout = split(params, settings.trainable)
    state = init_state(trained, settings=settings)
    losses = []
    for _ in range(count):
        tokens, loss_mask = batch(rows=rows)
        shape = (settings.grad_accumulation_steps, rows // settings.grad_accumulation_steps, -1)
        state, metrics = train_step(
            state, frozen, tokens.reshape(shape), loss_mask.reshape(shape), layout=layout, settings=settings
        )
        losses.append(float(metrics.loss))
    assert int(state.step) == count
    return state, frozen, layout, losses


FAST = TrainingConfig(steps=60, learning_rate=0.01, relative_rate=False, schedule="constant", warmup_fraction=0.0)


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(dtype, marks=pytest.mark.long) for dtype in ("bfloat16", "float16"))]
)
def test_the_loss_falls_and_what_is_frozen_stays_bit_for_bit(dtype):
    params = compressed_params(dtype=BF16)
    settings = dataclasses.replace(FAST, compute_dtype=dtype)
    state, frozen, layout, losses = run_steps(params, settings, count=40)
    assert losses[-1] < 0.7 * losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    merged = merged_params(state.trained, frozen, layout)
    before, after = trees.flatten(params), trees.flatten(merged)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if isinstance(leaf, CodebookArray):
            np.testing.assert_array_equal(after[path].index, leaf.index)
            assert after[path].codebook.dtype == BF16
            assert (after[path].shape, after[path].axis) == (leaf.shape, leaf.axis)
            assert not np.array_equal(after[path].codebook, leaf.codebook)
        else:
            np.testing.assert_array_equal(after[path], leaf)
            assert after[path].dtype == leaf.dtype


def merged_params(trained, frozen, layout):
    flat = {}
    for block, tree in merge_params(trained, frozen, layout):
        prefix = "" if block is None else f"model/layers/{block}/"
        flat |= {prefix + path: leaf for path, leaf in trees.iterate(tree)}
    return trees.unflatten(flat)


def test_splitting_and_merging_gives_the_model_back():
    params = compressed_params(odd_block=0)
    merged = merged_params(*split(params, (".*/codebook", ".*norm/weight", "lm_head/kernel")))
    chex.assert_trees_all_equal(trees.flatten(merged), trees.flatten(params))


@pytest.mark.long
def test_accumulated_batches_are_one_large_batch():
    params = compressed_params(dtype=np.float32)
    whole = run_steps(params, FAST)[0].trained
    parts = run_steps(params, dataclasses.replace(FAST, grad_accumulation_steps=2))[0].trained
    chex.assert_trees_all_close(whole, parts, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_steps_are_those_of_optax_with_vectors_at_a_tenth_of_the_rate():
    params = compressed_params(dtype=np.float32)
    trainable = (".*/codebook", "model/norm/weight", r"model/layers/\d+/input_layernorm/weight")
    settings = dataclasses.replace(FAST, trainable=trainable, clip_norm=0.5)
    trained, frozen, layout = split(params, trainable)
    start = jax.tree.map(jnp.copy, trained)
    tokens, loss_mask = batch()
    state = init_state(trained, settings=settings)
    state, metrics = train_step(state, frozen, tokens[None], loss_mask[None], layout=layout, settings=settings)
    count = int(loss_mask[:, 1:].sum())

    def mean(trained):
        return summed_loss(trained, frozen, tokens, loss_mask, layout=layout, settings=settings) / count

    loss, gradient = jax.value_and_grad(mean)(start)
    rule = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01, weight_decay=0.0))
    updates, _ = rule.update(gradient, rule.init(start), start)
    for name, update in trees.iterate(updates):
        moved = trees.flatten(state.trained)[name] - trees.flatten(start)[name]
        share = 1.0 if name.endswith("/codebook") else 0.1
        np.testing.assert_allclose(moved, share * update, rtol=1e-3, atol=2e-6)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics.gradient_norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert int(metrics.scored) == count


@pytest.mark.nans
def test_a_step_that_is_not_finite_changes_nothing():
    settings = FAST
    trained, frozen, layout = split(compressed_params())
    broken = trees.flatten(frozen)
    broken["rest/model/norm/weight"] = jnp.full(CONFIG.hidden_size, jnp.nan)
    state = init_state(trained, settings=settings)
    before = jax.device_get(state)
    tokens, loss_mask = batch()
    state, metrics = train_step(
        state, trees.unflatten(broken), tokens[None], loss_mask[None], layout=layout, settings=settings
    )
    assert not bool(metrics.finite)
    chex.assert_trees_all_equal(jax.device_get(state), before)


def test_rounded_masters_are_what_is_stored():
    params = compressed_params()
    trained, frozen, layout = split(params, (".*/codebook", ".*norm/weight"))
    moved = trees.map_by_path(lambda _, leaf: leaf * 1.0001 + 1e-4, trained)
    huge = trees.flatten(moved)
    name = "0-2/mlp/up_proj/kernel/codebook"
    huge[name] = huge[name].at[1, 0, 0].set(1e6)
    moved = trees.unflatten(huge)
    stored = trees.flatten(merged_params(moved, frozen, layout))
    kernel = "mlp/up_proj/kernel"
    assert [stored[f"model/layers/{i}/{kernel}"].dtype for i in range(3)] == [np.float16, BF16, np.float16]
    again, _, _ = split(
        trees.unflatten({path: upcast(leaf) for path, leaf in stored.items()}),
        (".*/codebook", ".*norm/weight"),
    )
    chex.assert_trees_all_equal(round_masters(moved, layout=layout), again)


def upcast(leaf):
    if isinstance(leaf, CodebookArray):
        return dataclasses.replace(leaf, codebook=leaf.codebook.astype(np.float32))
    return leaf


@pytest.mark.parametrize(
    ("trainable", "text"),
    [
        ((".*/codebook", "model/norms/weight"), "'model/norms/weight' matches no array"),
        (("embed_tokens",), "matches no array"),
    ],
)
def test_an_expression_that_matches_nothing_is_refused(trainable, text):
    with pytest.raises(InputError, match=text):
        split(compressed_params(), trainable)


def test_blocks_train_apart_where_the_expressions_say_so():
    trained, frozen, layout = split(compressed_params(), ("model/layers/[01]/.*/codebook",))
    assert [span.name for span in layout.spans] == ["0-1", "2-2"]
    assert trained.keys() == {"0-1"}
    assert trees.flatten(frozen)["2-2/mlp/up_proj/kernel"].codebook is not None
    tokens, loss_mask = batch()
    loss = summed_loss(trained, frozen, tokens, loss_mask, layout=layout, settings=FAST)
    assert np.isfinite(float(loss))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"grad_accumulation_steps": 0}, "grad_accumulation_steps is 0"),
        ({"trainable": ()}, "trainable"),
        ({"trainable": ("(",)}, "no regular expression"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"vector_lr_scale": float("nan")}, "vector_lr_scale is nan"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"compute_dtype": "int8"}, "compute_dtype is 'int8'"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, text):
    with pytest.raises(InputError, match=text):
        TrainingConfig(**changes)
