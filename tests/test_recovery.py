"""The recovery stage: compress as one call and one command, from the model to the trained result."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli_models import write_model, write_text
from small_runs import CONFIG, TOKENS

from cluscomp_jax import compress_blocks, llama
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.checkpoint.train_states import TrainStates
from cluscomp_jax.cli import main
from cluscomp_jax.clustering.matrix import matrix_size
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.recovery import RecoveryConfig, rate_at
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import build_model
from cluscomp_jax.pipeline import compress

PLAIN = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=12),), iterations=4),
    calibration=CalibrationConfig(samples=4, length=12),
    tuning=None,
)
RECOVERY = RecoveryConfig(steps=24, learning_rate=0.01, save_every=2, generated_samples=0)
RECOVERED = dataclasses.replace(PLAIN, recovery=RECOVERY)
GENERATED = dataclasses.replace(PLAIN, recovery=dataclasses.replace(RECOVERY, generated_samples=36))


@pytest.fixture(scope="module")
def params() -> Any:
    return llama.init_params(CONFIG, jax.random.key(0))


def divergence(params: Any, other: Any, tokens: Any = TOKENS) -> float:
    """The mean of KL(params || other) over all positions, in float64."""
    logits = [np.asarray(llama.forward(tree, tokens, CONFIG), np.float64) for tree in (params, other)]
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def test_recovery_brings_the_model_nearer_to_the_original_and_moves_no_index(params: Any) -> None:
    clustered, recovered = (compress(params, cfg, calibration=TOKENS) for cfg in (PLAIN, RECOVERED))
    assert divergence(params, recovered) < 0.8 * divergence(params, clustered)
    before, after = trees.flatten(clustered), trees.flatten(recovered)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if isinstance(leaf, CodebookArray):
            np.testing.assert_array_equal(leaf.index, after[path].index)
            assert leaf.codebook.dtype == after[path].codebook.dtype
            assert not np.array_equal(leaf.codebook, after[path].codebook)
        elif not path.endswith("norm/weight"):
            np.testing.assert_array_equal(leaf, after[path])


def test_samples_that_the_original_writes_help_on_text_that_none_has_seen(params: Any) -> None:
    unseen = np.random.default_rng(9).integers(0, CONFIG.vocab_size, (64, 12))
    alone, more = (
        compress(
            params,
            dataclasses.replace(cfg, recovery=dataclasses.replace(cfg.recovery, steps=120)),
            calibration=TOKENS[:1],
        )
        for cfg in (RECOVERED, GENERATED)
    )
    assert divergence(params, more, unseen) < 0.9 * divergence(params, alone, unseen)
    with pytest.raises(InputError, match="recovery: generated_samples is -1; it must be 0 or more"):
        RecoveryConfig(generated_samples=-1)


def test_the_same_call_gives_the_same_bytes(params: Any) -> None:
    first, again = (compress(params, GENERATED, calibration=TOKENS) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_without_a_rate_that_of_the_bits_is_taken(params: Any) -> None:
    clustered = compress(params, PLAIN, calibration=TOKENS)
    sizes = [
        matrix_size(path, leaf) for path, leaf in trees.flatten(clustered).items() if isinstance(leaf, CodebookArray)
    ]
    bits = sum(size.bits for size in sizes) / sum(math.prod(size.shape) for size in sizes)
    assert 1 < bits < 4
    unset, given = (RecoveryConfig(steps=2, learning_rate=rate) for rate in (None, rate_at(bits)))
    first, second = (
        compress(params, dataclasses.replace(PLAIN, recovery=recovery), calibration=TOKENS)
        for recovery in (unset, given)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(("bits", "rate"), [(0.6, 0.004), (1, 0.004), (2.5, 0.00219089), (4, 0.0012), (9, 0.0012)])
def test_the_rate_of_some_bits(bits: float, rate: float) -> None:
    assert rate_at(bits) == pytest.approx(rate, rel=1e-5)


def test_recovery_without_samples_or_without_a_model_is_refused(params: Any) -> None:
    with pytest.raises(InputError, match="recovery takes 24 steps over the calibration samples, and there are none"):
        compress(params, RECOVERED)
    embedded = np.ones((4, 12, CONFIG.hidden_size), np.float32)
    with pytest.raises(InputError, match="recovery takes 24 steps over calibration tokens, and the samples are embed"):
        compress(params, RECOVERED, calibration=embedded)
    blocks, inputs = [{"w": np.ones((8, 8), np.float32)}], np.ones((2, 3, 8), np.float32)
    with pytest.raises(InputError, match="a stack of blocks has not"):
        compress_blocks(blocks, lambda p, x: x @ p["w"], inputs, RECOVERED, rules=(CompressionRule(pattern="w"),))


@pytest.mark.parametrize("as_model", [False, True])
def test_what_recovery_would_refuse_is_refused_before_any_block_is_compressed(
    params: Any, as_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluscomp_jax.pipeline.compress_stream", None)
    short: Any = dataclasses.replace(CONFIG, max_position_embeddings=8)
    cfg = dataclasses.replace(RECOVERED, model=build_model(short) if as_model else short)
    with pytest.raises(InputError, match="recovery: calibration samples of 12 tokens exceed the model's context of 8"):
        compress(params, cfg, calibration=TOKENS)
    misspelt = RecoveryConfig(trainable=(".*norm/weight", ".*/codebok"))
    with pytest.raises(InputError, match=r"recovery: trainable '\.\*/codebok' matches no array"):
        compress(params, dataclasses.replace(RECOVERED, recovery=misspelt), calibration=TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    write_model(folder / "model")
    write_text(folder / "text.txt", 400)
    (folder / "run.toml").write_text(
        "tuning = false\n[[cluster.rules]]\nnum_codes = 8\n[calibration]\nsamples = 4\nlength = 16\n"
        "[recovery]\nsteps = 6\nsave_every = 2\ngenerated_samples = 3\n"
    )
    return folder


def argv(folder: Path, out: str) -> list[str]:
    text = str(folder / "text.txt")
    options = ["--config", str(folder / "run.toml"), "--calibration", text, "--evaluate", text, "--context", "16"]
    return ["compress", str(folder / "model"), "--out", str(folder / out), *options]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The checkpoint of an uninterrupted run."""
    assert main(argv(folder, "whole")) == 0
    return folder / "whole"


def test_the_command_records_recovery_and_measures_its_result(
    whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["run_config"]["recovery"]["steps"] == 6
    assert manifest["metrics"]["recovery"]["steps"] == 6
    assert manifest["metrics"]["stages"]["recover"]["seconds"] > 0
    assert sorted(path.name for path in whole.iterdir()) == [
        "blocks",
        "manifest.json",
        "metrics.jsonl",
        "rest",
        "tokenizer",
    ]
    assert main(["evaluate", str(whole), "--text", str(folder / "text.txt"), "--context", "16", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    assert measured == manifest["metrics"]["perplexity"]["compressed"]["perplexity"]


def test_a_run_interrupted_in_recovery_resumes_there_and_ends_in_the_same_bytes(
    whole: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = TrainStates.save

    def interrupted(states: TrainStates, step: int, *rest: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        save(states, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStates, "save", interrupted)
        assert main(argv(folder, "broken")) == 1
    assert main(["evaluate", str(folder / "broken"), "--text", str(folder / "text.txt")]) == 2
    assert "unfinished" in capsys.readouterr().err
    assert main(argv(folder, "broken")) == 0
    assert "resuming after 2 of 2 finished blocks" in capsys.readouterr().err
    metrics = json.loads((folder / "broken" / "manifest.json").read_text())["metrics"]
    assert metrics["recovery"]["first_step"] == 2
    assert open_checkpoint(folder / "broken").fingerprint() == open_checkpoint(whole).fingerprint()
