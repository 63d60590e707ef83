"""Trees of other codebases whose model is of a newer family: a state dict is taken, what nobody compared is refused."""

import chex
import numpy as np
import pytest
from family_cases import fields_of

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layouts import open_tree
from cluscomp_jax.models.model import build_model, parameter_shapes, parse_model_config
from cluscomp_jax.models.source import load_all


def problem(name):
    model = build_model(parse_model_config(fields_of(name)))
    rng = np.random.default_rng(0)
    return model, {p: rng.normal(size=s).astype(np.float32) for p, s in parameter_shapes(model).items()}


@pytest.mark.parametrize("name", ["gemma3", "olmo3", "granite_biased"])
def test_a_state_dict_is_taken(name):
    model, flat = problem(name)
    state = {}
    for path, array in flat.items():
        module, _, leaf = path.rpartition("/")
        state[f"{module}/{'bias' if leaf == 'bias' else 'weight'}".replace("/", ".")] = (
            array.T if leaf == "kernel" else array
        )
    opened = open_tree(state, model)
    assert opened.name == "a Hugging Face state dict"
    chex.assert_trees_all_equal(trees.flatten(load_all(opened.source, model)), flat)


def test_a_codebase_whose_forward_pass_was_not_compared_is_refused():
    model, flat = problem("granite_plain")
    names = {"input_layernorm/weight": "pre_self_attention_layer_norm/scale", "mlp/gate_proj/kernel": "mlp/wi_0/kernel"}
    tree = {"token_embedder/embedding": flat["model/embed_tokens/embedding"]}
    for i in range(model.num_blocks):
        tree |= {f"decoder/layers_{i}/{theirs}": flat[f"model/layers/{i}/{ours}"] for ours, theirs in names.items()}
    with pytest.raises(InputError, match="read for llama, mistral, qwen2, qwen3, not for granite") as caught:
        open_tree(tree, model)
    assert "\n" not in str(caught.value)
