import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_models import config_fields, hf_tensors

from cluscomp_jax.errors import InputError
from cluscomp_jax.models import tensor_names
from cluscomp_jax.models.llama import TENSOR_NAMES
from cluscomp_jax.models.model import build_model, parameter_shapes, parse_model_config

HUGGING_FACE, GGUF = TENSOR_NAMES["hugging_face"], TENSOR_NAMES["gguf"]
FAMILIES = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen3", {}),
]


def model_and_tensors(model_type, changes):
    model = build_model(parse_model_config(config_fields(model_type, **changes)))
    biases = {name: changes.get(name, False) for name in ("attention_bias", "mlp_bias")}
    return model, hf_tensors(model_type, tied=changes.get("tie_word_embeddings", False), **biases)


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES)
def test_every_tensor_of_every_family_finds_its_parameter(model_type, changes):
    model, tensors = model_and_tensors(model_type, changes)
    shapes = {name: array.shape for name, array in tensors.items()}
    names, tied_head = tensor_names.match_tensors(shapes, model, HUGGING_FACE, "here")
    assert sorted(names.values()) == sorted(tensors)
    assert set(names) == set(parameter_shapes(model))
    assert tied_head is None
    for path, name in names.items():
        assert tensor_names.to_flax(path, tensors[name]).shape == parameter_shapes(model)[path]


@pytest.mark.parametrize(
    ("path", "hf", "gguf"),
    [
        ("model/embed_tokens/embedding", "model.embed_tokens.weight", "token_embd.weight"),
        ("model/norm/weight", "model.norm.weight", "output_norm.weight"),
        ("lm_head/kernel", "lm_head.weight", "output.weight"),
        ("model/layers/7/self_attn/q_proj/kernel", "model.layers.7.self_attn.q_proj.weight", "blk.7.attn_q.weight"),
        ("model/layers/10/self_attn/o_proj/bias", "model.layers.10.self_attn.o_proj.bias", "blk.10.attn_output.bias"),
        (
            "model/layers/0/self_attn/k_norm/weight",
            "model.layers.0.self_attn.k_norm.weight",
            "blk.0.attn_k_norm.weight",
        ),
        ("model/layers/3/mlp/down_proj/kernel", "model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        (
            "model/layers/3/post_attention_layernorm/weight",
            "model.layers.3.post_attention_layernorm.weight",
            "blk.3.ffn_norm.weight",
        ),
    ],
)
def test_names_are_those_of_the_two_formats(path, hf, gguf):
    assert (HUGGING_FACE.name(path), GGUF.name(path)) == (hf, gguf)
    assert HUGGING_FACE.path(hf) == GGUF.path(gguf) == path


@settings(max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    pick=st.integers(0, 10**6),
    naming=st.sampled_from([HUGGING_FACE, GGUF]),
)
def test_path_undoes_name(family, pick, naming):
    paths = sorted(parameter_shapes(model_and_tensors(*family)[0]))
    path = paths[pick % len(paths)]
    assert naming.path(naming.name(path)) == path


@settings(max_examples=60)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_kernel_is_the_transpose_of_what_is_stored_and_an_embedding_is_not(rows, columns, seed):
    stored = np.random.default_rng(seed).normal(size=(rows, columns))
    kernel = tensor_names.to_flax("lm_head/kernel", stored)
    x = np.random.default_rng(seed + 1).normal(size=(3, columns))
    np.testing.assert_allclose(x @ kernel, np.einsum("bi,oi->bo", x, stored), atol=1e-12)
    np.testing.assert_array_equal(tensor_names.to_flax("model/embed_tokens/embedding", stored), stored)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.00.self_attn.q_proj.weight",
        "model.layers.0.norm.weight",
        "model.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "weight",
        "",
    ],
)
def test_a_foreign_name_has_no_path(name):
    assert HUGGING_FACE.path(name) is None


def test_a_path_outside_the_table_is_refused_by_name():
    with pytest.raises(InputError, match="model/layers/0/mlp/router/kernel"):
        HUGGING_FACE.name("model/layers/0/mlp/router/kernel")
    with pytest.raises(InputError, match="model/norm/kernel"):
        GGUF.name("model/norm/kernel")
