"""A checkpoint whose provenance and metrics are of its maker's own shape is inspected, reported and exported."""

from pathlib import Path
from typing import Any

import pytest
from export_models import Run, make_params
from io_models import config_fields

from cluscomp_jax.checkpoint.reader import save_checkpoint
from cluscomp_jax.checkpoint.recorded import recorded
from cluscomp_jax.cli import main
from cluscomp_jax.models.llama.hf_config import parse_config

PARAMS = make_params()
STRANGE: list[dict[str, Any]] = [
    *({"provenance": {"model": value}} for value in ("mine", ["a"], {"name": 3}, {"name": "x", "files": "y"})),
    *({"provenance": {"calibration": value}} for value in ("wiki", {"shape": 3}, {"name": 1, "shape": [1, 2]}, True)),
    {"provenance": {"versions": "1.0", "device": 5, "finished": [], "command": {"a": 1}, "tokenizer": 7}},
    {"provenance": {"versions": {"jax": 1}}},
    *({"metrics": {"perplexity": value}} for value in (5, [1], {"original": "x"}, {"original": {"perplexity": "a"}})),
    *({"metrics": {"matrices": value}} for value in (3, {"a": 1}, [1], [{"path": "x"}])),
    *({"metrics": {"blocks": value}} for value in (3, [1], [{"index": "one"}], [{"index": 0, "epoch_losses": 3}])),
    *({"metrics": {"stages": value}} for value in ([], {"tune": 3}, {"tune": {"seconds": "x"}})),
    {"metrics": {"seconds": "long", "peak_rss_bytes": [1], "mine": {"deep": [1]}}},
]  # fmt: skip


@pytest.mark.parametrize("told", STRANGE, ids=lambda told: str(told)[:60])
def test_commands_leave_out_what_they_do_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], told: dict[str, Any]
) -> None:
    folder = tmp_path / "c"
    save_checkpoint(folder, PARAMS, Run(parse_config(config_fields())), **told)
    for argv in (
        ["inspect", str(folder)],
        ["report", str(folder)],
        ["compare", str(folder), str(folder)],
        ["export", str(folder), "--format", "dense", "--out", str(tmp_path / "e")],
    ):
        assert main(argv) == 0, capsys.readouterr().err
    assert (tmp_path / "e" / "README.md").is_file()


def test_what_our_commands_record_is_known() -> None:
    provenance = {
        "model": {"name": "a", "kind": "hf", "files": [{"name": "b", "bytes": 3}]},
        "calibration": {"name": "t", "shape": [2, 3], "sha256": "0"},
        "tokenizer": "0",
        "versions": {"jax": "1"},
        "command": "cluscomp",
    }
    matrix = {"path": "p", "shape": [2, 3], "axis": "out", "g": 2, "num_codes": 4, "bits": 7.0, "bits_per_weight": 1.2}
    metrics = {
        "perplexity": {"original": {"perplexity": None, "windows": 1, "context": 2}},
        "matrices": [matrix],
        "blocks": [{"index": 0, "epoch_losses": [1.0], "loss_after": 2.0}],
        "stages": {"tune": {"seconds": 1.0, "peak_rss_bytes": None}},
        "seconds": 2.0,
    }
    manifest = {"provenance": provenance, "metrics": metrics, "run_config": {"cluster": {"iterations": 3}}}
    assert recorded(manifest) == manifest
