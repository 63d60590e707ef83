"""Calibration on embeddings: the codes of token calibration, padding that counts nowhere, resumption, commands."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_models import write_model
from small_runs import CONFIG, TOKENS, FoldersSink

from cluscomp_jax import Embeddings, InputError, compress, llama, open_model
from cluscomp_jax.cli import main
from cluscomp_jax.clustering.hessian import collect_hessians
from cluscomp_jax.clustering.sensitivity import sensitivities
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.losses import mean_squared_error, token_weights
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.source import as_source
from cluscomp_jax.models.streams import Batch
from cluscomp_jax.pipeline import compress_stream
from cluscomp_jax.runtime.reporter import SilentReporter

RUN = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=12),), iterations=4),
    calibration=CalibrationConfig(samples=4, length=12),
    tuning=BlockTuningConfig(epochs=2, learning_rate=0.01, validation_samples=1),
)
BUDGET = dataclasses.replace(RUN, cluster=ClusterConfig(bits=3.5, coding="auto", iterations=2), tuning=None)
MODEL = build_model(CONFIG)


@pytest.fixture(scope="module")
def params() -> Any:
    return llama.init_params(CONFIG, jax.random.key(0))


def embedded(params: Any) -> np.ndarray:
    """What the embedding gives for the calibration tokens, looked up in NumPy."""
    return np.asarray(params["model"]["embed_tokens"]["embedding"], np.float32)[TOKENS]


def padded(x: np.ndarray, side: str, seed: int = 0) -> Embeddings:
    """The samples with three positions of noise more, at one side or in the middle."""
    random = np.random.default_rng(seed)
    at = {"left": 0, "right": x.shape[1], "middle": 5}[side]
    noise = 100 * random.standard_normal((len(x), 3, x.shape[2])).astype(np.float32)
    mask = np.ones((len(x), x.shape[1] + 3), bool)
    mask[:, at : at + 3] = False
    tokens = np.insert(TOKENS, [at] * 3, -1, axis=1)
    return Embeddings(np.concatenate([x[:, :at], noise, x[:, at:]], axis=1), mask, tokens)


def ragged(x: np.ndarray) -> Embeddings:
    """The samples cut to 12, 9, 6 and 12 positions."""
    lengths = np.array([12, 9, 6, 12])[: len(x)]
    mask = np.arange(x.shape[1]) < lengths[:, None]
    return Embeddings(x, mask, np.where(mask, TOKENS, -1))


def test_own_embeddings_give_the_codes_of_tokens(params: Any) -> None:
    want = compress(params, RUN, calibration=TOKENS)
    chex.assert_trees_all_equal(compress(params, RUN, calibration=embedded(params)), want)
    whole = Embeddings(embedded(params), np.ones(TOKENS.shape, bool), TOKENS)
    chex.assert_trees_all_equal(compress(params, RUN, calibration=whole), want)


@pytest.mark.long
def test_a_budget_is_spent_as_by_tokens_where_the_embeddings_have_them(params: Any) -> None:
    want = compress(params, BUDGET, calibration=TOKENS)
    x = embedded(params)
    chex.assert_trees_all_equal(compress(params, BUDGET, calibration=Embeddings(x, None, TOKENS)), want)
    evenly = dataclasses.replace(BUDGET, cluster=dataclasses.replace(BUDGET.cluster, mixed_precision="none"))
    chex.assert_trees_all_equal(
        compress(params, BUDGET, calibration=x), compress(params, evenly, calibration=Embeddings(x, None, TOKENS))
    )


def test_where_the_padding_is_and_what_it_holds_is_of_no_account(params: Any) -> None:
    x = embedded(params)
    want = compress(params, RUN, calibration=TOKENS)
    for side in ("left", "right", "middle"):
        chex.assert_trees_all_equal(compress(params, RUN, calibration=padded(x, side)), want)
    mask = ragged(x).mask
    assert mask is not None
    noise = np.where(mask[..., None], x, 1e6)
    chex.assert_trees_all_equal(
        compress(params, RUN, calibration=ragged(x)), compress(params, RUN, calibration=Embeddings(noise, mask))
    )


def test_short_samples_count_by_their_positions(params: Any) -> None:
    x = embedded(params)
    given = ragged(x)
    assert given.mask is not None
    assert given.weights is not None
    block, layer_type = as_source(params, MODEL).load_block(0), MODEL.layer_type(0)
    group = next(iter(MODEL.input_groups))
    batches = [Batch(jnp.asarray(x[i : i + 1]), None, jnp.asarray(given.weights[i : i + 1])) for i in range(len(x))]
    found = collect_hessians(MODEL, layer_type, [group], block, batches)[group].hessian
    rows: list[np.ndarray] = []

    def observer(name: str, value: jax.Array, *_: Any) -> None:
        if name == group:
            rows.append(np.asarray(value, np.float64))

    MODEL.block(block, jnp.asarray(x), layer_type=layer_type, observer=observer)
    valid = rows[0].reshape(*TOKENS.shape, -1)[given.mask]
    want = valid.T @ valid / len(valid)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_losses_are_means_over_valid_positions() -> None:
    random = np.random.default_rng(0)
    prediction, target = (random.standard_normal((3, 7, 5)).astype(np.float32) for _ in range(2))
    mask = np.arange(7) < np.array([7, 4, 1])[:, None]
    target[0, 0] *= 100
    weights = (mask / mask.mean()).astype(np.float32)
    squares = np.mean(target.astype(np.float64) ** 2, axis=-1)
    medians = [np.median(row[valid]) for row, valid in zip(squares, mask, strict=True)]
    factors = np.minimum(1, 2.0 * np.array(medians)[:, None] / squares)
    found = token_weights(jnp.asarray(target), 2.0, jnp.asarray(weights))
    np.testing.assert_allclose(np.asarray(found)[mask], factors[mask], rtol=1e-5)
    for limit, factor in ((0.0, np.ones_like(factors)), (2.0, factors)):
        error = mean_squared_error(prediction, target, massive_activation_limit=limit, weights=jnp.asarray(weights))
        want = np.mean((factor[..., None] * (prediction - target) ** 2)[mask])
        assert float(error) == pytest.approx(want, rel=1e-5)


def test_sensitivities_count_the_labels_alone(params: Any, tmp_path: Path) -> None:
    """One sample cut short is that sample alone at its length."""
    x = embedded(params)[:1]
    mask = np.arange(12)[None] < 7
    source = as_source(params, MODEL)

    def measured(name: str, calibration: Any) -> dict[str, float]:
        (tmp_path / name).mkdir()
        options: dict[str, Any] = {"work_dir": tmp_path / name, "reporter": SilentReporter()}
        settings = ClusterConfig(error_feedback=False)
        return sensitivities(MODEL, source, calibration, settings=settings, **options).kernels

    longer = np.concatenate([x, x])
    both = np.concatenate([mask, np.ones_like(mask)])
    tokens = np.where(both, TOKENS[[0, 0]], -1)
    want = {
        path: (7 * short + 12 * whole) / 19
        for (path, short), whole in zip(
            measured("short", TOKENS[:1, :7]).items(), measured("whole", TOKENS[:1]).values(), strict=True
        )
    }
    found = measured("both", Embeddings(longer, both, tokens))
    assert found.keys() == want.keys()
    assert all(found[path] == pytest.approx(want[path], rel=1e-4) for path in want)
    silent = Embeddings(np.where(both[..., None], longer, 0.0).astype(np.float32), both, tokens)
    assert all(value == pytest.approx(found[path], rel=1e-4) for path, value in measured("again", silent).items())


@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_interrupted_run_on_padded_samples_gives_the_same_bytes(params: Any, tmp_path: Path, fail_at: int) -> None:
    given = ragged(embedded(params)).packed()

    def go(sink: FoldersSink, folder: Path, finished: int) -> None:
        source = as_source(params, MODEL)
        compress_stream(source, sink, RUN, calibration=given, work_dir=folder, finished_blocks=finished)

    whole, broken = FoldersSink(), FoldersSink(fail_at)
    go(whole, tmp_path / "whole", 0)
    with pytest.raises(KeyboardInterrupt):
        go(broken, tmp_path / "broken", 0)
    broken.fail_at = None
    go(broken, tmp_path / "broken", fail_at)
    chex.assert_trees_all_equal(broken.params(MODEL), whole.params(MODEL))


def test_per_matrix_without_tokens_is_refused(params: Any) -> None:
    run = dataclasses.replace(BUDGET, cluster=dataclasses.replace(BUDGET.cluster, mixed_precision="per_matrix"))
    with pytest.raises(InputError, match="measures a loss of tokens, and the calibration embeddings have none"):
        compress(params, run, calibration=embedded(params))


def test_another_width_is_refused(params: Any) -> None:
    with pytest.raises(InputError, match="calibration embeddings have width 5"):
        compress(params, RUN, calibration=np.ones((4, 12, 5), np.float32))


def test_the_command_line_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "model")
    opened = open_model(folder)
    tokens = np.random.default_rng(0).integers(0, 30, (4, 12)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens.ravel())
    (tmp_path / "offsets.txt").write_text("".join(f"{12 * i}\n" for i in range(4)))
    table = np.asarray(opened.source.load_outer()["model"]["embed_tokens"]["embedding"])
    np.savez(tmp_path / "e.npz", inputs=np.insert(table[tokens], 0, 0, axis=1), tokens=np.insert(tokens, 0, -1, axis=1),
             mask=np.insert(np.ones((4, 12), bool), 0, False, axis=1))  # fmt: skip
    (tmp_path / "run.toml").write_text("[tuning]\nvalidation_samples = 0\nbatch_size = 2\nepochs = 1\n")
    shared = ["--g", "4", "--num-codes", "12", "--config", str(tmp_path / "run.toml")]
    cut = ["--samples", "4", "--length", "12", "--sample-offsets", str(tmp_path / "offsets.txt")]
    runs = {"tokens.npy": cut, "e.npz": []}
    for name, options in runs.items():
        given = ["--calibration", str(tmp_path / name), "--out", str(tmp_path / f"out-{name}")]
        assert main(["compress", str(folder), *given, *shared, *options]) == 0
    params = [open_model(tmp_path / f"out-{name}").source.load_block(1) for name in runs]
    assert any(isinstance(leaf, CodebookArray) for leaf in trees.flatten(params[0]).values())
    chex.assert_trees_all_equal(*params)
    assert "4 x 12 positions of embeddings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "3"], "--samples 3 has no effect on embeddings"),
        (["--length", "8"], "--length 8 has no effect on embeddings"),
        (["--bits", "3", "--mixed-precision", "per_matrix"], "the calibration embeddings have none"),
        ([], "calibration embeddings have width 3, the model's blocks read 64"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    width = 3 if not options else 64
    np.savez(tmp_path / "e.npz", inputs=np.ones((128, 12, width), np.float32))
    command = ["compress", str(write_model(tmp_path / "model")), "--calibration", str(tmp_path / "e.npz")]
    assert main([*command, "--out", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
