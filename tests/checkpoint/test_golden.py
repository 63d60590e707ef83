"""The committed checkpoint of format version 1 loads for ever, to the very bytes it was made of."""

import ml_dtypes
import numpy as np
import pytest
from digests import digest
from paths import FIXTURES

from cluscomp_jax.checkpoint.reader import describe, load_checkpoint, open_checkpoint
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.llama import LlamaConfig

GOLDEN = FIXTURES / "golden_v1"

# Printed by scripts/make_golden.py from the parameters it made, not from what it saved.
PINNED = {
    "model/embed_tokens/embedding": "524be32a992298ff6d362c3328280fbc06d3d16374a7521e4384eefaa068f644",
    "model/layers/0/input_layernorm/weight": "77155f8416815fedf2bba29fd3553c7d18698bce9083a268175b8a6909df57e4",
    "model/layers/0/mlp/down_proj/kernel": "cbf90d68649ce088284afda4ff59dea96cb34243db312bc65bfcfbf08abea83e",
    "model/layers/0/mlp/gate_proj/kernel": "ef0d9f714363de8fe49f475a3f0ac197d09ef5ab654239224a79c0539dd15e37",
    "model/layers/0/mlp/up_proj/kernel": "42224884dac8b6e5e73c968e73ffafa62fbff932a3c0d04274a006644d99e946",
    "model/layers/0/post_attention_layernorm/weight": (
        "ded6cfe56ac31723bd421f5dde1571bf5b183c504d53486905830c187631d98c"
    ),
    "model/layers/0/self_attn/k_proj/kernel": "7f660ed3e359fb6b117517da7775ab42c3cdffd246841a2c3a5884775d31d04c",
    "model/layers/0/self_attn/o_proj/kernel": "1be4c7eb9bbc301553867493138f3e6d6497c366e38cc9e97a6d1e3345421c74",
    "model/layers/0/self_attn/q_proj/kernel": "39c43f3c6f218172e192492b40d7b23447f2c343dd211d74a1f707b170093e81",
    "model/layers/0/self_attn/v_proj/kernel": "488d08c77810d2f488f70f2c46ad62da1c106222850573e37cd6928113df7c5a",
    "model/norm/weight": "9243109cfd24326deb72bf524ef20d158c1736871a2cc69137a92fdf3ba6328b",
}


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(GOLDEN)


def test_every_parameter_is_the_one_that_was_saved(loaded):
    found = {path: digest(leaf) for path, leaf in trees.flatten(loaded.params).items()}
    assert found == PINNED


def test_every_matrix_has_its_shape_axis_and_dtypes(loaded):
    found = {
        path.removeprefix("model/layers/0/"): (w.shape, w.axis, w.codebook.shape, w.codebook.dtype, w.index.dtype)
        for path, w in trees.flatten(loaded.params).items()
        if isinstance(w, CodebookArray)
    }
    assert found == {
        "self_attn/q_proj/kernel": ((8, 8), "out", (13, 4), ml_dtypes.bfloat16, np.uint8),
        "self_attn/o_proj/kernel": ((8, 8), "in", (300, 3), np.float16, np.uint16),
        "mlp/up_proj/kernel": ((8, 12), "out", (256, 5), np.float16, np.uint8),
        "mlp/down_proj/kernel": ((12, 8), "out", (1, 8), ml_dtypes.bfloat16, np.uint8),
    }


def test_its_model_config_and_tokenizer_are_read(loaded):
    assert loaded.model_config == LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    source = open_checkpoint(GOLDEN, verify=True)
    assert (source.tokenizer_path / "tokenizer.json").read_text() == '{"note": "carried along as it is"}\n'
    assert describe(GOLDEN)["format_version"] == 1
