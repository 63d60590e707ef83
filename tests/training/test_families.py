"""Training a model whose blocks differ in kind: its loss is that of the forward pass, and its step lowers it."""

import jax
import numpy as np
import pytest
from family_cases import compressed, fields_of

from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.models.decoder import forward
from cluscomp_jax.models.model import build_model, parse_model_config
from cluscomp_jax.models.source import DictSource
from cluscomp_jax.training import init_state, split_params, summed_loss, train_step

TWO_KINDS = {"num_hidden_layers": 3, "layer_types": None, "sliding_window_pattern": 3}


@pytest.mark.parametrize(
    ("name", "changes", "spans"), [("gemma3_nested", TWO_KINDS, [(0, 2), (2, 1)]), ("opt_post_norm", {}, [(0, 4)])]
)
def test_the_loss_is_that_of_the_forward_pass_and_a_step_lowers_it(name, changes, spans):
    model = build_model(parse_model_config(fields_of(name) | changes))
    params = compressed(model)
    settings = TrainingConfig(steps=4, batch_size=2, learning_rate=0.01, trainable=(".*/codebook", ".*norm/weight"))
    trained, frozen, layout = split_params(DictSource(params, model), model, settings.trainable)
    assert [(span.first, span.count) for span in layout.spans] == spans
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(0, 96, (2, 9)).astype(np.int32), rng.random((2, 9)) < 0.7
    found = summed_loss(trained, frozen, tokens, mask, layout=layout, settings=settings)
    logits = np.asarray(forward(params, tokens, model), np.float64)
    nll = np.log(np.exp(logits).sum(-1))[:, :-1]
    picked = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None].astype(np.int64), -1)[..., 0]
    expected = ((nll - picked) * mask[:, 1:]).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    state, losses = init_state(trained, settings=settings), []
    for _ in range(4):
        state, metrics = train_step(state, frozen, tokens[None], mask[None], layout=layout, settings=settings)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trained))
