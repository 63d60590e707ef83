"""Gradients of codebooks through a whole model, live against PyTorch's autograd on the same weights, float32."""

import jax
import numpy as np
import pytest
from script_modules import load_script

from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.llama import build, parse_config
from cluscomp_jax.models.source import DictSource
from cluscomp_jax.training import split_params, summed_loss

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

fixtures = load_script("make_torch_fixtures")

FIELDS = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
G, CODES = 4, 300


def compressed(params, model, seed):
    """Every kernel of a block cut into random codes of its own scale."""
    kernels = {path for paths in model.input_groups.values() for path in paths}
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if path.removeprefix("model/layers/").partition("/")[2] not in kernels:
            return leaf
        codebook = (np.std(leaf) * rng.standard_normal((CODES, G))).astype(np.float32)
        index = rng.integers(0, CODES, (leaf.shape[0], -(-leaf.shape[1] // G))).astype(np.uint16)
        return CodebookArray(codebook, index, tuple(leaf.shape), "out")

    return trees.map_by_path(one, params)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral_window"])
def test_gradients_are_those_of_autograd(name):
    torch_model = fixtures.torch_model(FIELDS | fixtures.CASES[name] | {"num_hidden_layers": 2}, 5)
    model = build(parse_config(fixtures.config_json(torch_model)))
    params = compressed(trees.unflatten(fixtures.our_layout(torch_model)), model, 5)
    rng = np.random.default_rng(6)
    tokens, loss_mask = rng.integers(0, FIELDS["vocab_size"], (2, 60)), rng.random((2, 60)) < 0.6

    codebooks, weights = {}, {}
    for path, leaf in trees.iterate(params):
        if isinstance(leaf, CodebookArray):
            codebooks[path] = torch.tensor(leaf.codebook, requires_grad=True)
            decoded = codebooks[path][torch.from_numpy(leaf.index.astype(np.int64))].reshape(leaf.shape[0], -1)
            weights[path.replace("/", ".").removesuffix("kernel") + "weight"] = decoded[:, : leaf.shape[1]].T
    logits = torch.func.functional_call(torch_model, weights, (torch.from_numpy(tokens),)).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten(), reduction="none"
    )
    expected = losses[torch.from_numpy(loss_mask[:, 1:]).flatten()].sum()
    expected.backward()

    trained, frozen, layout = split_params(DictSource(params, model), model, (".*/codebook",))
    loss, gradient = jax.value_and_grad(summed_loss)(
        trained, frozen, tokens, loss_mask, layout=layout, settings=TrainingConfig()
    )
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    errors = {}
    for span in layout.spans:
        for relative, stacked in trees.iterate(gradient[span.name]):
            for place in range(span.count):
                path = f"model/layers/{span.first + place}/{relative.removesuffix('/codebook')}"
                theirs = codebooks[path].grad.numpy()
                errors[path] = np.linalg.norm(stacked[place] - theirs) / np.linalg.norm(theirs)
    print(f"{name}: largest relative error {max(errors.values()):.1e}")
    assert errors.keys() == codebooks.keys()
    assert max(errors.values()) <= 1e-3, errors
