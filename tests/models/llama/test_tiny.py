"""The committed small Llama: an ordinary folder, PyTorch's logits, and a model that has learnt its language."""

import json
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from paths import FIXTURES
from safetensors import safe_open

from cluscomp_jax import llama
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.models.source import load_all
from cluscomp_jax.text.text import load_tokens

LOGITS = FIXTURES / "tiny_llama_logits.safetensors"


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> OpenedModel:
    return open_model(tiny_model)


def test_the_fixture_is_small(tiny_model: Path) -> None:
    assert sum(file.stat().st_size for file in tiny_model.iterdir()) <= 6_000_000


def test_logits_equal_pytorch(opened: OpenedModel) -> None:
    with safe_open(LOGITS, framework="numpy") as file:
        tokens, positions, expected = (file.get_tensor(name) for name in ("tokens", "positions", "logits"))
    params = load_all(opened.source, opened.model)
    actual = np.asarray(llama.forward(params, tokens, opened.config)[:, positions])
    chex.assert_type(actual, jnp.float32)
    chex.assert_equal_shape([actual, expected])
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_perplexity_of_held_out_text_equals_pytorch(
    opened: OpenedModel, tiny_train_tokens: np.ndarray, tiny_test_tokens: np.ndarray
) -> None:
    with safe_open(LOGITS, framework="numpy") as file:
        windows, expected = int(file.metadata()["windows"]), float(file.metadata()["perplexity"])
    context = opened.config.max_position_embeddings
    scored = tiny_test_tokens[: windows * context]
    result = perplexity(opened.source, scored, opened.config, context=context, batch_size=8)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    counts = np.bincount(tiny_train_tokens, minlength=opened.config.vocab_size) + 1.0
    unigram = np.exp(-np.mean(np.log(counts / counts.sum())[scored]))
    assert result.perplexity < unigram / 6


def test_our_tokenizer_loading_gives_the_same_tokens(
    opened: OpenedModel, tiny_test_tokens: np.ndarray, tmp_path: Path
) -> None:
    tokenizer = opened.load_tokenizer()
    text = tokenizer.decode(tiny_test_tokens[:500].tolist())
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    np.testing.assert_array_equal(load_tokens(tmp_path / "text.txt", tokenizer), tiny_test_tokens[:500])


def test_weights_are_stored_in_bfloat16(tiny_model: Path) -> None:
    with safe_open(tiny_model / "model.safetensors", framework="numpy") as file:
        stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert stored == {"BF16"}
    assert json.loads((tiny_model / "config.json").read_text())["dtype"] == "bfloat16"
