"""A coding that the package does not know goes through compress, tuning, save, load, evaluate and generate."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cluscomp_jax
from cluscomp_jax import llama
from cluscomp_jax.clustering import coders
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import coding as codings
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.coding import Coding, Form
from cluscomp_jax.errors import InputError
from cluscomp_jax.pipeline import compress

CONFIG = llama.LlamaConfig(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 60, (4, 12))


@dataclasses.dataclass(frozen=True)
class Int8(Coding):
    """Eight bits a weight and one scale: the codebook [1, 1] is the scale, the index int8 [d_in, d_out]."""

    name = "int8-test"
    splits_lines = True

    def check(self, form: Form, where: str) -> None:
        if (form.num_codes, form.group_size) != (1, 1):
            raise InputError(f"{where}: int8 has one scale")

    def index_spec(self, form: Form) -> tuple[tuple[int, int], Any]:
        return form.matrix_shape, np.dtype(np.int8)

    def index_bits(self, form: Form) -> int:
        return 8 * form.lines * form.vectors

    def check_index(self, form: Form, index: np.ndarray, where: str) -> None:
        if (index == -128).any():
            raise InputError(f"{where}: -128 is no number of a symmetric grid")

    def pack(self, form: Form, index: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(index).reshape(-1).view(np.uint8)

    def unpack(self, form: Form, stored: np.ndarray, count: int) -> np.ndarray:
        return stored.view(np.int8).reshape(count, *form.matrix_shape)

    def decode(self, form: Form, codebook: jax.Array, index: jax.Array) -> jax.Array:
        return index.astype(codebook.dtype) * codebook[0, 0]

    def matmul(self, form: Form, x: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
        return (x @ index.astype(x.dtype)) * codebook[0, 0].astype(x.dtype)

    def codes(self, form: Form, index: Any) -> jax.Array:
        return jnp.zeros(form.matrix_shape, jnp.int32)

    def index_of(self, form: Form, codes: Any) -> jax.Array:
        return jnp.asarray(codes).astype(jnp.int8)


class Int8Rule(CompressionRule):
    @property
    def coding(self) -> Coding:
        return Int8()

    def form(self, matrix_shape: tuple[int, int]) -> Form:
        return Form(matrix_shape, 1, 1, "out")


def fit(weight: Any, rule: Any, channel_weights: Any, *, key: Any, iterations: int, codes: bool) -> Any:
    scale = jnp.max(jnp.abs(weight)) / 127
    return scale.reshape(1, 1), jnp.round(jnp.asarray(weight) / scale).astype(jnp.int32)


@pytest.fixture
def int8() -> Any:
    known = dict(codings._CODINGS), dict(coders._CODERS)
    codings.register(Int8)
    coders.register(Int8.name, coders.Coder(fit))
    yield
    for table, before in zip((codings._CODINGS, coders._CODERS), known, strict=True):
        table.clear()
        table.update(before)


def run(**cluster: Any) -> CompressConfig:
    return CompressConfig(
        model=CONFIG,
        cluster=ClusterConfig(rules=(Int8Rule(),), **cluster),
        calibration=CalibrationConfig(samples=4, length=12),
        tuning=BlockTuningConfig(epochs=2, learning_rate=0.01),
    )


def test_it_goes_all_the_way(int8: Any, tmp_path: Any) -> None:
    params = llama.init_params(CONFIG, jax.random.key(0))
    result = compress(params, run(error_feedback=False), calibration=TOKENS)
    kernel = result["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, CodebookArray)
    assert kernel.coding == Int8()
    dense = np.asarray(params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"])
    assert np.abs(np.asarray(decode(kernel)) - dense).max() < 0.05 * np.abs(dense).max()
    assert cluscomp_jax.size_report(result).bits_per_weight == pytest.approx(8, abs=0.2)

    cluscomp_jax.save(tmp_path / "tree", result)
    loaded = cluscomp_jax.load(tmp_path / "tree")
    for again in (loaded, jax.tree.map(jnp.asarray, loaded)):
        found = again["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        np.testing.assert_array_equal(found.index, kernel.index)
        np.testing.assert_array_equal(np.asarray(found.codebook), np.asarray(kernel.codebook))
    text = TOKENS.reshape(-1)
    dense_score = cluscomp_jax.perplexity(params, text, CONFIG, context=12).perplexity
    assert cluscomp_jax.perplexity(loaded, text, CONFIG, context=12).perplexity == pytest.approx(dense_score, rel=0.05)
    out = cluscomp_jax.generate(loaded, [[1, 2, 3]], CONFIG, max_new_tokens=4)
    assert out is not None


def test_error_feedback_needs_a_search(int8: Any) -> None:
    params = llama.init_params(CONFIG, jax.random.key(0))
    with pytest.raises(InputError, match="coding 'int8-test' has no error feedback; set error_feedback = false"):
        compress(params, run(), calibration=TOKENS)


def test_a_checkpoint_of_an_unknown_coding_is_refused_by_name(int8: Any, tmp_path: Any) -> None:
    w = CodebookArray(np.ones((1, 1), np.float16), np.ones((4, 4), np.int8), (4, 4), coding=Int8())
    cluscomp_jax.save(tmp_path / "tree", {"w": w})
    del codings._CODINGS[Int8.name]
    with pytest.raises(InputError, match="coding is 'int8-test'; it must be one of plain, trellis"):
        cluscomp_jax.load(tmp_path / "tree")
