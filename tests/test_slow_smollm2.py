"""The real SmolLM2-135M: its perplexity on the shipped text, and that saving and loading keep every bit of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cluscomp_jax import data
from cluscomp_jax.checkpoint.reader import load_checkpoint, open_checkpoint, save_checkpoint
from cluscomp_jax.cli import main
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.config.run import load_config
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.io.open import open_model
from cluscomp_jax.text.text import load_tokens

pytestmark = pytest.mark.slow

QUICK = """
tuning = false

[cluster]
iterations = 1

[[cluster.rules]]
group_size = 4
num_codes = 256
"""


@pytest.mark.parametrize(("context", "expected"), [(1024, 18.0088), (512, 19.3395)])
def test_perplexity_of_the_original(context: int, expected: float) -> None:
    opened = open_model(find_model())
    tokens = load_tokens(data.path("wiki_test"), opened.load_tokenizer())[:50_176]
    measured = perplexity(opened.source, tokens, opened.model, context=context)
    assert measured.windows == 50_176 // context
    assert measured.perplexity == pytest.approx(expected, abs=0.02)


def evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> float:
    argv = ["evaluate", str(folder), "--text", str(data.path("wiki_test")), "--context", "512", "--tokens", "2048"]
    assert main([*argv, "--json"]) == 0
    measured: float = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    return measured


def test_a_compressed_model_loaded_and_saved_again_is_the_same_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, settings = tmp_path / "first", tmp_path / "second", tmp_path / "quick.toml"
    settings.write_text(QUICK)
    assert main(["compress", str(find_model()), "--out", str(first), "--config", str(settings)]) == 0
    loaded = load_checkpoint(first)
    cfg = dataclasses.replace(load_config(settings), model=loaded.model_config)
    save_checkpoint(second, loaded.params, cfg, tokenizer=open_checkpoint(first).tokenizer_path)

    before, after = trees.flatten(loaded.params), trees.flatten(load_checkpoint(second).params)
    assert list(before) == list(after)
    compressed = [path for path, leaf in before.items() if isinstance(leaf, CodebookArray)]
    assert len(compressed) == 30 * 7
    for path, leaf in before.items():
        again = after[path]
        if isinstance(leaf, CodebookArray):
            assert (leaf.shape, leaf.axis) == (again.shape, again.axis)
            pairs = [(leaf.codebook, again.codebook), (leaf.index, again.index)]
        else:
            pairs = [(leaf, again)]
        for a, b in pairs:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    assert evaluate(first, capsys) == evaluate(second, capsys)
