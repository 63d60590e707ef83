"""Whole runs with trellis indices: interrupted and resumed, tuned, finetuned, generated from."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from small_runs import CONFIG, TOKENS, FoldersSink

import cluscomp_jax
from cluscomp_jax import llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode, validate
from cluscomp_jax.core.coding import TrellisCoding
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.source import as_source
from cluscomp_jax.pipeline import compress, compress_stream

RUN = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=2, num_codes=16, step_bits=3),), iterations=4),
    calibration=CalibrationConfig(samples=4, length=12),
    tuning=BlockTuningConfig(epochs=2, learning_rate=0.01),
)


@pytest.fixture(scope="module")
def params() -> Any:
    return llama.init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def compressed(params: Any) -> Any:
    return compress(params, RUN, calibration=TOKENS)


def kernels(params: Any) -> dict[str, CodebookArray]:
    return {path: leaf for path, leaf in trees.iterate(params) if isinstance(leaf, CodebookArray)}


def test_every_kernel_is_a_valid_trellis(compressed: Any) -> None:
    assert len(kernels(compressed)) == 21
    for path, kernel in kernels(compressed).items():
        validate(kernel, path)
        assert kernel.coding == TrellisCoding(3)


def test_an_interrupted_run_resumed_gives_the_bytes_of_an_uninterrupted_one(
    params: Any, compressed: Any, tmp_path: Path
) -> None:
    model, sink = build_model(CONFIG), FoldersSink(fail_at=2)

    def go(finished: int) -> None:
        compress_stream(
            as_source(params, model), sink, RUN, calibration=TOKENS, work_dir=tmp_path, finished_blocks=finished
        )

    with pytest.raises(KeyboardInterrupt):
        go(0)
    sink.fail_at = None
    go(2)
    chex.assert_trees_all_equal(sink.params(model), compressed)


def test_tuning_moves_codebooks_and_keeps_streams(params: Any, compressed: Any) -> None:
    untuned = compress(params, dataclasses.replace(RUN, tuning=None), calibration=TOKENS)
    path = "model/layers/0/self_attn/q_proj/kernel"  # the first group's inputs do not depend on tuning
    before, after = kernels(untuned)[path], kernels(compressed)[path]
    np.testing.assert_array_equal(before.index, after.index)
    assert not np.array_equal(before.codebook, after.codebook)


def test_a_checkpoint_gives_the_same_perplexity_and_tokens(compressed: Any, tmp_path: Path) -> None:
    cluscomp_jax.save_checkpoint(tmp_path / "out", compressed, RUN)
    loaded, config = cluscomp_jax.load_checkpoint(tmp_path / "out")
    chex.assert_trees_all_equal(loaded, compressed)
    dense = jax.tree.map(
        lambda leaf: decode(leaf) if isinstance(leaf, CodebookArray) else leaf,
        compressed,
        is_leaf=lambda leaf: isinstance(leaf, CodebookArray),
    )
    scores = [
        cluscomp_jax.perplexity(tree, TOKENS.reshape(-1), config, context=12).perplexity for tree in (loaded, dense)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    for how in ("once", "call"):
        tokens = cluscomp_jax.generate(loaded, np.array([[1, 2, 3]]), config, max_new_tokens=4, decode_weights=how)
        assert tokens.shape == (1, 4)


def test_codes_of_the_weights_alone_along_either_axis(params: Any) -> None:
    for axis in ("out", "in"):
        rule = CompressionRule(group_size=2, num_codes=64, step_bits=4, axis=axis)
        cluster = ClusterConfig(rules=(rule,), weighted=False, error_feedback=False)
        found = compress(params, dataclasses.replace(RUN, cluster=cluster, tuning=None))
        for path, kernel in kernels(found).items():
            validate(kernel, path)
            weight = np.asarray(trees.flatten(params)[path])
            assert np.square(np.asarray(decode(kernel)) - weight).sum() < 0.2 * np.square(weight).sum(), path
