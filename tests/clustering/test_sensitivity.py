"""Sensitivities against gradients of the whole model in one piece, and against the loss itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_llamas import MIXED, random_params, random_tokens

from cluscomp_jax.clustering import sensitivity
from cluscomp_jax.clustering.sensitivity import output_weights, sensitivities
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.losses import token_nll
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.calibration import Embeddings
from cluscomp_jax.models.llama.model import build
from cluscomp_jax.models.source import as_source
from cluscomp_jax.runtime.reporter import SilentReporter

PLAIN = ClusterConfig(error_feedback=False)


@pytest.fixture(scope="module")
def problem():
    model, params = build(MIXED), random_params(MIXED)
    return model, params, np.asarray(random_tokens(MIXED, (3, 12)))


def whole_loss(kernels, flat, tokens, model):
    params = trees.unflatten(flat | kernels)
    x = model.embed(params, tokens[None], dtype=jnp.float32)
    for i in range(model.num_blocks):
        x = model.block(params["model"]["layers"][str(i)], x, layer_type=model.layer_type(i))
    return jnp.sum(token_nll(model.head(params, x[:, :-1]), tokens[None, 1:]))


@pytest.mark.long
def test_it_is_half_the_squared_gradients_of_single_samples(problem, tmp_path):
    model, params, tokens = problem
    found = sensitivities(
        model, as_source(params, model), tokens, settings=PLAIN, work_dir=tmp_path, reporter=SilentReporter()
    )
    flat = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in trees.flatten(params).items()}
    paths = [p for p in flat if p.endswith("_proj/kernel")]
    assert set(found.kernels) == set(found.outputs) == set(paths)
    gradient = jax.jit(jax.grad(partial(whole_loss, model=model)))
    for path in paths:
        squares = [jnp.sum(gradient({path: flat[path]}, flat, jnp.asarray(s))[path] ** 2, axis=0) for s in tokens]
        outputs = np.asarray(sum(squares))
        np.testing.assert_allclose(found.outputs[path], outputs, rtol=1e-3, atol=1e-6 * outputs.max())
        expected = float(outputs.sum()) * float(jnp.mean(flat[path] ** 2)) / (2 * tokens.size)
        assert found.kernels[path] == pytest.approx(expected, rel=1e-3)
    assert not list(tmp_path.iterdir())


def test_what_it_has_on_the_disk_is_what_it_says(problem, tmp_path, monkeypatch):
    model, params, tokens = problem
    sizes = []

    class Watched(sensitivity.ActivationStore):
        def delete(self):
            sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            super().delete()

    monkeypatch.setattr(sensitivity, "ActivationStore", Watched)
    sensitivities(model, as_source(params, model), tokens, settings=PLAIN, work_dir=tmp_path, reporter=SilentReporter())
    assert max(sizes) == sensitivity.scratch_bytes(model.num_blocks, tokens.shape, MIXED.hidden_size)


def test_feedback_leaves_a_share_of_it(problem, tmp_path):
    model, params, tokens = problem
    run = partial(sensitivities, model, as_source(params, model), tokens, work_dir=tmp_path, reporter=SilentReporter())
    plain, fed = run(settings=PLAIN).kernels, run(settings=ClusterConfig()).kernels
    assert all(0 < fed[path] < plain[path] for path in plain)


def test_outputs_count_by_limited_roots_of_their_sensitivities():
    np.testing.assert_allclose(output_weights(np.asarray([1.0, 4.0, 9.0])), np.asarray([1, 2, 3]) / 2, rtol=1e-6)
    rare = output_weights(np.r_[np.zeros(99), 1.0])  # its root is 100 times the mean
    np.testing.assert_allclose(rare, np.r_[np.full(99, 0.1), 8.0] / 0.179, rtol=1e-6)
    np.testing.assert_array_equal(output_weights(np.zeros(5, np.float32)), np.ones(5))


def test_a_gradient_that_is_not_finite_is_told_by_its_kernel(problem, tmp_path):
    model, params, tokens = problem
    flat = trees.flatten(params)
    path = next(path for path in flat if path.endswith("norm/weight") and "layers" in path)
    broken = trees.unflatten(flat | {path: np.full(flat[path].shape, np.inf, np.float32)})
    with pytest.raises(FloatingPointError, match=r"_proj/kernel: the gradient of the model's loss by it is not finite"):
        sensitivities(
            model, as_source(broken, model), tokens, settings=PLAIN, work_dir=tmp_path, reporter=SilentReporter()
        )


def test_samples_without_a_token_to_predict_are_refused(problem, tmp_path):
    model, params, tokens = problem
    inputs = np.ones((*tokens.shape, MIXED.hidden_size), np.float32)
    unlabelled = Embeddings(inputs, None, np.full(tokens.shape, -1))
    with pytest.raises(InputError, match="none of the first 3 calibration samples has a token after"):
        sensitivities(
            model, as_source(params, model), unlabelled, settings=PLAIN, work_dir=tmp_path, reporter=SilentReporter()
        )
