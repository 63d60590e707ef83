"""Runs that write the toy family's checkpoints, and what a whole checkpoint is."""

import chex
import jax
import numpy as np
from toy_checkpoint import ToyConfig, ToyRun, toy_block, toy_outer, toy_params

from cluscomp_jax.checkpoint.reader import CheckpointWriter, load_checkpoint

CONFIG = ToyConfig(num_blocks=2)
ONE_BLOCK = ToyConfig(num_blocks=1)
RUN = ToyRun(CONFIG)


def writer(out, *, fingerprint="f", config=CONFIG, seed=42):
    return CheckpointWriter(out, model_config=config, run_config=ToyRun(seed=seed).to_dict(), fingerprint=fingerprint)


def write_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def run(out, config=CONFIG):
    """A whole run, as a pipeline would do it: resumes where it can."""
    with writer(out, config=config) as w:
        for i in range(w.finished_blocks):
            assert_same(w.load_block(i), toy_block(config, i))
        for i in range(w.finished_blocks, config.num_blocks):
            (w.work_path / "activations").write_bytes(bytes(1000))
            w.store_block(i, toy_block(config, i))
        w.store_outer(toy_outer(config))
        w.store_tokenizer(write_tokenizer)
        w.finish(provenance={}, metrics={})


def assert_whole(out, config=CONFIG):
    assert_same(load_checkpoint(out).params, toy_params(config))
    assert sorted(p.name for p in out.iterdir()) == ["blocks", "manifest.json", "rest", "tokenizer"]


def assert_same(left, right):
    """Equal structure (static fields of codebooks included), dtypes and bits."""
    chex.assert_trees_all_equal_structs(left, right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
