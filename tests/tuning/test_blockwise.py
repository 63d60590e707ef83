"""Statistics, activation streams and block-wise tuning on a small random Llama."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from cluscomp_jax import llama
from cluscomp_jax.clustering import hessian
from cluscomp_jax.clustering.hessian import collect_hessian_diagonals, collect_hessians
from cluscomp_jax.clustering.matrix import cluster_matrix
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.losses import mean_squared_error, token_weights
from cluscomp_jax.models.activations import ActivationStore, run_through
from cluscomp_jax.models.streams import Batch
from cluscomp_jax.runtime.reporter import SilentReporter
from cluscomp_jax.tuning import blockwise, tune_block
from cluscomp_jax.tuning.blockwise import block_loss, init_state, join_trainable, split_trainable, tuning_step
from cluscomp_jax.tuning.optimizer import make_optimizer
from pallas_kernels import implementation
from pallas_kernels._compat import lowering_for

CONFIG = llama.LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3,
)  # fmt: skip
MODEL = llama.build(CONFIG)
TYPE = MODEL.layer_type(0)
FAST = BlockTuningConfig(epochs=6, learning_rate=0.01, relative_rate=False, schedule="constant")


@pytest.fixture(scope="module")
def dense():
    return llama.init_params(CONFIG, jax.random.key(0))["model"]["layers"]["0"]


@pytest.fixture(scope="module")
def compressed(dense):
    kernels = {path for paths in MODEL.input_groups.values() for path in paths}

    def one(path, leaf):
        if path not in kernels:
            return leaf
        rule = CompressionRule(group_size=4, num_codes=12)
        return cluster_matrix(leaf, rule, ClusterConfig(iterations=5), key=jax.random.key(1))[0]

    return trees.map_by_path(one, dense)


@pytest.fixture
def streams(tmp_path, dense):
    x = np.random.default_rng(0).standard_normal((6, 10, 16)).astype(np.float32)
    inputs, targets = (ActivationStore(tmp_path / name, x.shape, np.float32) for name in ("x", "y"))
    inputs.write(slice(0, 6), x)
    run_through(
        lambda batch: MODEL.block(dense, batch, layer_type=TYPE), inputs, targets, batch_size=4, dtype=jnp.float32
    )
    return inputs, targets


def test_hessian_diagonals_are_the_mean_squares_of_what_each_kernel_reads(dense, streams):
    inputs, _ = streams
    diagonals = collect_hessian_diagonals(MODEL, TYPE, dense, (Batch(jnp.asarray(x)) for _, x in inputs.batches(4)))
    seen = {}
    MODEL.block(
        dense,
        jnp.asarray(inputs.read(slice(0, 6))),
        layer_type=TYPE,
        observer=lambda group, x, *_: seen.update({group: x}),
    )
    for group, paths in MODEL.input_groups.items():
        expected = np.mean(np.asarray(seen[group], np.float64).reshape(60, -1) ** 2, axis=0)
        for path in paths:
            np.testing.assert_allclose(diagonals[path], expected, rtol=1e-5)
            assert diagonals[path].shape == (trees.flatten(dense)[path].shape[0],)
    with pytest.raises(ValueError, match="no batches"):
        collect_hessian_diagonals(MODEL, TYPE, dense, [])


def seen_by_group(block, x):
    """{input group: (input, residual)} float64 [positions, channels] of a block, by the observer alone."""
    seen = {}
    observer = lambda group, x, onto, _: seen.update({group: (x, onto)})  # noqa: E731
    MODEL.block(block, jnp.asarray(x), layer_type=TYPE, observer=observer)
    rows = lambda a: None if a is None else np.asarray(a, np.float64).reshape(-1, a.shape[-1])  # noqa: E731
    return {group: (rows(x), rows(onto)) for group, (x, onto) in seen.items()}


def test_hessians_are_the_mean_products_of_what_the_input_group_reads(dense, streams):
    inputs, _ = streams
    for group, (rows, _) in seen_by_group(dense, inputs.read(slice(0, 6))).items():
        batches = (Batch(jnp.asarray(x)) for _, x in inputs.batches(4))
        statistics = collect_hessians(MODEL, TYPE, [group], dense, batches)[group]
        np.testing.assert_allclose(statistics.hessian, rows.T @ rows / 60, rtol=1e-4, atol=1e-6)
        assert statistics.drift is None
        assert statistics.errors is None
    with pytest.raises(ValueError, match="no batches"):
        collect_hessians(MODEL, TYPE, ["mlp/input"], dense, [])


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_of_two_streams_give_the_error_of_the_outputs(dense, streams, weighted):
    inputs, _ = streams
    rng = np.random.default_rng(3)
    x0 = inputs.read(slice(0, 6))
    x = x0 + 0.3 * rng.standard_normal(x0.shape).astype(np.float32)
    block = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), dense)
    was, now = seen_by_group(dense, x0), seen_by_group(block, x)
    counts = rng.uniform(0, 1, x.shape[:2]).astype(np.float32) if weighted else np.ones(x.shape[:2], np.float32)
    batches = [
        Batch(*(jnp.asarray(a[where]) for a in (x, x0, counts))) if weighted else Batch(x[where], x0[where])
        for where in (slice(0, 4), slice(4, 6))
    ]
    for group, paths in MODEL.input_groups.items():
        statistics = collect_hessians(MODEL, TYPE, [group], block, batches, original=dense)[group]
        (rows, onto), (rows0, onto0) = now[group], was[group]
        kernel = np.asarray(trees.flatten(dense)[paths[0]], np.float64)
        lacking = rows0 @ kernel - rows @ kernel + (0 if onto is None else onto0 - onto)
        each = counts.reshape(-1, 1).astype(np.float64)
        np.testing.assert_allclose(statistics.hessian, (each * rows).T @ rows / 60, rtol=1e-4, atol=1e-5)
        assert (statistics.errors is None) == (onto is None)
        given = statistics.errors if statistics.drift is None else np.asarray(statistics.drift, np.float64) @ kernel
        np.testing.assert_allclose(given, (each * rows).T @ lacking / 60, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_store_gives_back_what_was_written_rounded_to_its_dtype(tmp_path, dtype):
    values = np.random.default_rng(1).standard_normal((5, 3, 2)).astype(np.float32)
    store = ActivationStore(tmp_path / "deep" / "s.bin", values.shape, dtype)
    for begin in range(0, 5, 2):
        store.write(slice(begin, begin + 2), values[begin : begin + 2])
    np.testing.assert_array_equal(store.read(slice(0, 5)), values.astype(dtype))
    np.testing.assert_array_equal(store.read(np.array([4, 1])), values.astype(dtype)[[4, 1]])
    assert [(where.start, len(x)) for where, x in store.batches(2)] == [(0, 2), (2, 2), (4, 1)]
    assert (tmp_path / "deep" / "s.bin").stat().st_size == 30 * np.dtype(dtype).itemsize
    store.delete()
    assert not (tmp_path / "deep" / "s.bin").exists()


def test_a_stream_can_run_through_in_place(tmp_path):
    store = ActivationStore(tmp_path / "s", (5, 2, 2), np.float32)
    store.write(slice(0, 5), np.arange(20, dtype=np.float32).reshape(5, 2, 2))
    run_through(lambda x: 2 * x + 1, store, store, batch_size=2, dtype=jnp.float32)
    np.testing.assert_array_equal(store.read(slice(0, 5)).ravel(), 2 * np.arange(20) + 1)


def test_gradients_reach_the_codebooks_alone_and_equal_finite_differences(compressed, streams):
    inputs, targets = (jnp.asarray(store.read(slice(0, 1))) for store in streams)
    codebooks, frozen = split_trainable(compressed, norms=False)
    assert all(isinstance(frozen[path], CodebookArray) and frozen[path].codebook is None for path in codebooks)
    chex.assert_trees_all_equal(join_trainable(codebooks, frozen), compressed)
    codebooks = {path: codebook.astype(jnp.float32) for path, codebook in codebooks.items()}

    def loss(codebooks):
        return block_loss(codebooks, frozen, inputs, targets, model=MODEL, layer_type=TYPE, settings=FAST)

    gradients = jax.grad(loss)(codebooks)
    chex.assert_trees_all_equal_shapes(gradients, codebooks)
    rng = np.random.default_rng(2)
    for path, codebook in codebooks.items():
        direction = rng.standard_normal(codebook.shape).astype(np.float32)
        step = 1e-2 / np.linalg.norm(direction)
        up, down = (loss(codebooks | {path: codebook + sign * step * direction}) for sign in (1, -1))
        expected = float(np.vdot(gradients[path], direction))
        np.testing.assert_allclose((float(up) - float(down)) / (2 * step), expected, rtol=2e-2, atol=2e-4)


def test_loss_is_the_mean_squared_distance_to_the_target(compressed, streams):
    x, y = (jnp.asarray(store.read(slice(0, 2))) for store in streams)
    codebooks, frozen = split_trainable(compressed, norms=False)
    dense = trees.map_by_path(_decoded, compressed)
    output = np.asarray(MODEL.block(dense, x, layer_type=TYPE), np.float64)
    for target in (y, 2 * y):
        loss = float(block_loss(codebooks, frozen, x, target, model=MODEL, layer_type=TYPE, settings=FAST))
        np.testing.assert_allclose(loss, np.mean((output - np.asarray(target)) ** 2), rtol=1e-5)


def test_a_step_is_adamw_on_the_gradient(compressed, streams):
    x, y = (jnp.asarray(store.read(slice(0, 1))) for store in streams)
    codebooks, frozen = split_trainable(compressed, norms=False)
    settings = dataclasses.replace(FAST, weight_decay=0.1)
    state = init_state(codebooks, settings=settings, total_steps=3)
    start = jax.tree.map(jnp.copy, state.trained)
    gradients = jax.grad(lambda c: block_loss(c, frozen, x, y, model=MODEL, layer_type=TYPE, settings=settings))(start)
    state, _ = tuning_step(state, frozen, x, y, model=MODEL, layer_type=TYPE, settings=settings, total_steps=3)
    for path, before in start.items():
        g = np.asarray(gradients[path], np.float64)
        # The first step of Adam: both moments' bias corrections cancel, which leaves g / (|g| + eps).
        expected = before - 0.01 * (g / (np.abs(g) + 1e-8) + 0.1 * np.asarray(before))
        np.testing.assert_allclose(state.trained[path], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norms", [False, True])
def test_tuning_lowers_the_loss_and_leaves_indices_and_dense_leaves_alone(compressed, streams, norms):
    settings = dataclasses.replace(FAST, norms=norms)
    tuned, result = tune_block(
        MODEL, TYPE, compressed, *streams, settings, rng=np.random.default_rng(0), reporter=SilentReporter()
    )
    assert result.epoch_losses[-1] < 0.7 * result.loss_before
    assert (result.chosen_epoch, result.diverged, result.held_out_losses) == (6, False, ())
    before, after = trees.flatten(compressed), trees.flatten(tuned)
    for path, leaf in before.items():
        if isinstance(leaf, CodebookArray):
            np.testing.assert_array_equal(after[path].index, leaf.index)
            assert not np.array_equal(after[path].codebook, leaf.codebook)
        else:
            assert np.array_equal(after[path], leaf) == (not norms or leaf.ndim != 1)


@jax.jit
def takes_a_while(x):
    """Zero, after some 20 ms of work."""
    square = jnp.full((256, 256), x)
    return jax.lax.fori_loop(0, 30, lambda _, m: m @ square, square)[0, 0] * 0.0


def test_a_step_is_not_begun_before_the_last_but_one_is_done(compressed, streams, monkeypatch):
    step, losses = blockwise._Problem.step, []

    def slow_step(problem, state, where):
        assert all(loss.is_ready() for loss in losses[:-1]), "batches pile up on the device"
        state, loss = step(problem, state, where)
        losses.append(loss + takes_a_while(0.0 * loss))
        return state, losses[-1]

    monkeypatch.setattr(blockwise._Problem, "step", slow_step)
    settings = dataclasses.replace(FAST, epochs=1)
    tune_block(MODEL, TYPE, compressed, *streams, settings, rng=np.random.default_rng(0), reporter=SilentReporter())
    assert len(losses) == 6


def test_a_batch_of_statistics_is_not_added_before_the_last_is(streams):
    added = []

    def add(sums, batch):
        assert all(total.is_ready() for total in added), "batches pile up on the device"
        total = jnp.sum(batch.x) + takes_a_while(0.0 * batch.x[0, 0, 0])
        added.append(total if sums is None else sums["inputs"] + total)
        return {"inputs": jnp.copy(added[-1])}

    batches = [Batch(jnp.asarray(x)) for _, x in streams[0].batches(1)]
    means = hessian._means(batches, add)
    np.testing.assert_allclose(means["inputs"], np.sum([batch.x for batch in batches]) / 60, rtol=1e-5)


def test_vectors_take_a_tenth_of_the_step_of_codebooks(compressed, streams):
    """AdamW's first step is as long as its rate, whatever the gradient."""
    settings = dataclasses.replace(FAST, norms=True, schedule="constant", learning_rate=1e-3)
    trained, frozen = split_trainable(compressed, norms=True)
    assert sorted(p for p, leaf in trained.items() if leaf.ndim == 1) == [
        "input_layernorm/weight",
        "post_attention_layernorm/weight",
    ]
    x, y = (jnp.asarray(store.read(slice(0, 2))) for store in streams)
    state = init_state(trained, settings=settings, total_steps=9)
    state, _ = tuning_step(state, frozen, x, y, model=MODEL, layer_type=TYPE, settings=settings, total_steps=9)
    for path, start in trained.items():
        step = np.abs(np.asarray(state.trained[path]) - np.asarray(start, np.float32))
        np.testing.assert_allclose(step.max(), 1e-3 if start.ndim == 2 else 1e-4, rtol=2e-2)


def test_tuning_is_deterministic_and_follows_its_random_order(compressed, streams):
    def codebooks(seed):
        tuned, _ = tune_block(
            MODEL, TYPE, compressed, *streams, FAST, rng=np.random.default_rng(seed), reporter=SilentReporter()
        )
        return split_trainable(tuned, norms=False)[0]

    chex.assert_trees_all_equal(codebooks(0), codebooks(0))
    assert any(not np.array_equal(a, b) for a, b in zip(codebooks(0).values(), codebooks(1).values(), strict=True))


def test_held_out_samples_choose_the_epoch(compressed, streams):
    settings = dataclasses.replace(FAST, validation_samples=2, learning_rate=0.3, epochs=3)
    inputs, targets = streams
    tuned, result = tune_block(
        MODEL, TYPE, compressed, inputs, targets, settings, rng=np.random.default_rng(0), reporter=SilentReporter()
    )
    assert len(result.held_out_losses) == 4
    assert result.chosen_epoch == int(np.argmin(result.held_out_losses))
    x, y = (jnp.asarray(store.read(slice(4, 6))) for store in streams)
    trained, frozen = split_trainable(tuned, norms=True)
    kept = float(block_loss(trained, frozen, x, y, model=MODEL, layer_type=TYPE, settings=settings))
    np.testing.assert_allclose(kept, min(result.held_out_losses), rtol=1e-5)


def test_a_hopeless_rate_keeps_the_codebooks_it_started_with(compressed, streams):
    settings = dataclasses.replace(FAST, learning_rate=50.0)
    tuned, result = tune_block(
        MODEL, TYPE, compressed, *streams, settings, rng=np.random.default_rng(0), reporter=SilentReporter()
    )
    assert result.chosen_epoch == 0
    before, _ = split_trainable(compressed, norms=False)
    chex.assert_trees_all_equal(split_trainable(tuned, norms=False)[0], jax.tree.map(jnp.float32, before))


@pytest.mark.nans
def test_a_loss_that_is_not_finite_stops_the_block_at_the_last_good_codebooks(compressed, streams):
    inputs, targets = streams
    poisoned = targets.read(slice(0, 6)).copy()
    poisoned[3] = np.nan
    targets.write(slice(0, 6), poisoned)
    settings = dataclasses.replace(FAST, epochs=2)
    tuned, result = tune_block(
        MODEL, TYPE, compressed, inputs, targets, settings, rng=np.random.default_rng(0), reporter=SilentReporter()
    )
    assert result.diverged
    assert len(result.epoch_losses) == 1
    chex.assert_tree_all_finite(split_trainable(tuned, norms=False)[0])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (BlockTuningConfig(learning_rate=1.0, schedule="constant"), [1, 1, 1, 1, 1]),
        (BlockTuningConfig(learning_rate=1.0, schedule="linear"), [1, 0.8, 0.6, 0.4, 0.2]),
        (BlockTuningConfig(learning_rate=1.0, schedule="cosine"), [(1 + np.cos(np.pi * k / 5)) / 2 for k in range(5)]),
        (BlockTuningConfig(learning_rate=1.0, schedule="constant", warmup_fraction=0.4), [0.5, 1, 1, 1, 1]),
    ],
)
def test_schedules(settings, expected):
    optimizer = make_optimizer(dataclasses.replace(settings, relative_rate=False), 5)
    parameters = {"a": jnp.zeros(1)}
    state, rates = optimizer.init(parameters), []
    for _ in range(5):
        updates, state = optimizer.update({"a": jnp.ones(1)}, state, parameters)
        rates.append(-float(updates["a"][0]))  # Adam on a constant gradient steps by the rate itself
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_clipping_bounds_the_gradient_that_adam_sees():
    optimizer = make_optimizer(BlockTuningConfig(clip_norm=1.0), 5)
    parameters = {"a": jnp.zeros(4)}
    _, state = optimizer.update({"a": jnp.full(4, 100.0)}, optimizer.init(parameters), parameters)
    mu = optax.tree.get(state, "mu")["a"]
    np.testing.assert_allclose(jnp.linalg.norm(mu), 0.1, rtol=1e-5)


def test_float16_gradients_do_not_vanish(compressed, streams):
    """The loss is a mean of squares far below float16's smallest number; its gradient must survive all the same."""
    x, y = (jnp.asarray(store.read(slice(0, 6))) for store in streams)
    codebooks, frozen = split_trainable(compressed, norms=False)
    near = y + 1e-3 * (MODEL.block(trees.map_by_path(_decoded, compressed), x, layer_type=TYPE) - y)
    mean = {}
    for dtype in ("float32", "float16"):
        settings = dataclasses.replace(FAST, compute_dtype=dtype)
        state = init_state(codebooks, settings=settings, total_steps=3)
        state, _ = tuning_step(state, frozen, x, near, model=MODEL, layer_type=TYPE, settings=settings, total_steps=3)
        mean[dtype] = optax.tree.get(state.optimizer, "mu")
    for path, expected in mean["float32"].items():
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(mean["float16"][path], expected, atol=0.1 * scale)


def _decoded(_, leaf):
    return decode(leaf) if isinstance(leaf, CodebookArray) else leaf


def test_positions_of_huge_outputs_count_in_proportion_less():
    outputs = np.random.default_rng(0).standard_normal((2, 9, 5)).astype(np.float32)
    outputs[0, 0] *= 1000.0
    squares = np.mean(outputs.astype(np.float64) ** 2, axis=-1)
    expected = np.minimum(1.0, 2.0 * np.median(squares, axis=1, keepdims=True) / squares)
    weights = token_weights(jnp.asarray(outputs), 2.0)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    assert weights[0, 0] < 1e-4
    np.testing.assert_array_equal(token_weights(jnp.asarray(outputs), 0.0), np.ones((2, 9)))
    other = outputs + 1.0
    loss = mean_squared_error(jnp.asarray(other), jnp.asarray(outputs), massive_activation_limit=2.0)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(mean_squared_error(jnp.asarray(other), jnp.asarray(outputs)), 1.0, rtol=1e-4)


@pytest.mark.parametrize(("fast", "kernel"), [(True, "codebook_scatter"), (False, "codebook_segment_sum")])
def test_the_settings_choose_the_order_of_gradients_on_a_gpu(compressed, fast, kernel, monkeypatch):
    monkeypatch.setattr(implementation, "cuda_can_be_compiled", lambda: True)
    settings = dataclasses.replace(FAST, atomic_gradients=fast, compute_dtype="bfloat16")
    trained, frozen = split_trainable(compressed, norms=False)
    x = jnp.zeros((1, 10, 16), jnp.bfloat16)
    options = {"model": MODEL, "layer_type": TYPE, "settings": settings}
    gradient = jax.jit(jax.grad(lambda trained: block_loss(trained, frozen, x, x, **options)))
    with lowering_for((8, 6)):
        lowered = gradient.trace(trained).lower(lowering_platforms=("cuda",)).as_text()
    assert kernel in lowered
    assert lowered.count("codebook_scatter") == 0 or fast
