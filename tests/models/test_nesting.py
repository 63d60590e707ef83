"""Text models inside larger ones: names, configs, and what is refused."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from io_models import config_fields
from vlm_models import TRANSFORMERS_4, TRANSFORMERS_5, nested_fields, stored_name

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import parse_model_config
from cluscomp_jax.models.nesting import NESTINGS, NestedNames, Nesting, names_in, register_nesting
from cluscomp_jax.models.tensor_names import names_of

FORMS = {"transformers 4": TRANSFORMERS_4, "transformers 5": TRANSFORMERS_5}
PATHS = st.sampled_from(
    [
        "model/embed_tokens/embedding",
        "model/norm/weight",
        "lm_head/kernel",
        "model/layers/0/mlp/up_proj/kernel",
        "model/layers/17/self_attn/q_proj/bias",
    ]
)


@pytest.mark.parametrize("form", FORMS)
@given(path=PATHS)
def test_plain_and_stored_names_undo_each_other(form: str, path: str) -> None:
    plain = names_of(parse_model_config(nested_fields()), "hugging_face").name(path)
    stored = stored_name(plain, FORMS[form])
    names = names_in(NESTINGS["llava"], [stored, stored_name("model.norm.weight", FORMS[form])], "folder")
    assert names.stored(plain) == stored
    assert names.plain(stored) == plain


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("vision_tower.layers.0.weight", TRANSFORMERS_4),
        ("image_newline", TRANSFORMERS_4),
        ("model.vision_tower.layers.0.weight", TRANSFORMERS_5),
        ("model.image_newline", TRANSFORMERS_5),
        ("model.multi_modal_projector.linear_1.weight", TRANSFORMERS_5),
    ],
)
def test_what_is_around_is_outside(name: str, form: dict[str, str]) -> None:
    names = names_in(NESTINGS["llava_next"], [stored_name("model.norm.weight", form), name], "folder")
    assert names.plain(name) is None
    assert names.split({name: 1, stored_name("model.norm.weight", form): 2}) == ({"model.norm.weight": 2}, {name: 1})


def test_a_plain_name_without_a_stored_one_is_refused() -> None:
    names = NestedNames((("model.language_model.", "model."),))
    with pytest.raises(InputError, match=r"'lm_head\.weight' of a text model has no name"):
        names.stored("lm_head.weight")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (["model.norm.weight"], "no tensor with any of the prefixes of a text model, language_model., model.language"),
        (["language_model.model.norm.weight", "model.language_model.norm.weight"], "names of both of the prefixes"),
    ],
)
def test_names_of_no_form_or_of_both_are_refused(tensors: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        names_in(NESTINGS["llava"], tensors, "folder")


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_config_is_that_of_the_text_model_alone(model_type: str, family: str) -> None:
    text = config_fields(family)
    assert parse_model_config(nested_fields(model_type, text)) == parse_model_config(text)


def test_sizes_that_a_hub_leaves_out_are_those_of_transformers() -> None:
    # The whole text_config of llava-hf/llava-1.5-7b-hf, less the names of files.
    text = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}
    config = parse_model_config(nested_fields(text=text))
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_key_value_heads)
    assert sizes == (4096, 11008, 32, 32)
    assert config.vocab_size == 32064


def test_a_text_config_without_model_type_is_a_llama() -> None:
    text = config_fields()
    del text["model_type"]
    assert parse_model_config(nested_fields(text=text)).model_type == "llama"


@pytest.mark.parametrize(
    ("model_type", "outer", "inner", "tied"),
    [
        ("llava", None, True, True),
        ("llava", False, True, True),
        ("llava", True, False, True),
        ("llava_next", None, True, False),
        ("llava_next", True, False, True),
        ("llava_next", False, False, False),
    ],
)
def test_which_field_ties_embeddings(model_type: str, outer: bool | None, inner: bool, tied: bool) -> None:
    changes = {} if outer is None else {"tie_word_embeddings": outer}
    fields = nested_fields(model_type, config_fields(tie_word_embeddings=inner), **changes)
    assert parse_model_config(fields).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("outer", "inner", "tied"), [(None, None, True), (False, None, False), (None, False, False), (False, True, True)]
)
def test_embeddings_of_gemma_3_are_tied_unless_its_config_says_otherwise(
    outer: bool | None, inner: bool | None, tied: bool
) -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    fields: dict[str, Any] = {"model_type": "gemma3", "text_config": text}
    if outer is not None:
        fields["tie_word_embeddings"] = outer
    if inner is not None:
        text["tie_word_embeddings"] = inner
    config = parse_model_config(fields)
    assert config.model_type == "gemma3_text"
    assert config.vocab_size == 262208
    assert config.tie_word_embeddings is tied


def test_stop_tokens_of_the_whole_replace_those_of_the_text_model() -> None:
    text = config_fields(eos_token_id=3, pad_token_id=4)
    config = parse_model_config(nested_fields(text=text, eos_token_id=[5, 6]))
    assert config.eos_token_id == (5, 6)
    assert config.pad_token_id == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            nested_fields(text=config_fields("gpt2")),
            "text_config of llava: model_type 'gpt2' is not supported",
        ),
        (nested_fields(text={"model_type": 3}), "text_config of llava: model_type 3 is not supported"),
        (nested_fields(text_config=None), "text_config of llava is NoneType; it must be the mapping"),
        (
            nested_fields("idefics3"),
            "model_type 'idefics3' is not.*with one of these as text model: gemma3, llava",
        ),
        (
            nested_fields(quantization_config={"quant_method": "awq"}),
            "text_config of llava: config: quantization",
        ),
        (nested_fields(text=config_fields(logit_scale=2.0)), "text_config of llava: config: logit_scale is 2.0"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_model_config(fields)
    assert "\n" not in str(error.value)


def test_another_nested_model_is_registered_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluscomp_jax.models.nesting.NESTINGS", dict(NESTINGS))
    names = NestedNames((("backbone.llm.", "model."), ("head.", "lm_head.")))
    register_nesting("speech", Nesting((names,), text_config="llm_config"))
    config = parse_model_config({"model_type": "speech", "llm_config": config_fields()})
    assert dataclasses.replace(config) == parse_model_config(config_fields())
