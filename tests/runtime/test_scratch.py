"""Where activations lie meanwhile: in the folder that is asked for, with room looked for before any work."""

import collections
import os
import re
import shutil
import tempfile

import jax
import numpy as np
import pytest

from cluscomp_jax import BlockTuningConfig, CompressConfig, CompressionRule, compress, llama, perplexity
from cluscomp_jax.cli import main
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.activations import ActivationStore
from cluscomp_jax.runtime.scratch import scratch_folder

CONFIG = llama.LlamaConfig(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 60, (4, 12), np.int32)
RUN = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=12),), iterations=1, error_feedback=False),
    calibration=CalibrationConfig(samples=4, length=12),
    tuning=BlockTuningConfig(epochs=1, batch_size=2),
)


@pytest.fixture(scope="module")
def params():
    return llama.init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def opened(monkeypatch):
    """The paths and bytes of all streams that are made."""
    made = {}
    init = ActivationStore.__init__

    def watched(self, path, shape, dtype):
        init(self, path, shape, dtype)
        made[path] = path.stat().st_size

    monkeypatch.setattr(ActivationStore, "__init__", watched)
    return made


def free(monkeypatch, num_bytes):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - num_bytes, num_bytes))


CALLS = {
    "compress": lambda params, **options: compress(params, RUN, calibration=TOKENS, **options),
    "perplexity": lambda params, **options: perplexity(params, TOKENS.reshape(-1), CONFIG, context=12, **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("as_text", [False, True])
def test_activations_lie_in_the_folder_that_is_named_and_are_gone_afterwards(params, tmp_path, opened, call, as_text):
    call(params, work_dir=str(tmp_path) if as_text else tmp_path)
    assert opened
    assert all(path.parent.parent == tmp_path for path in opened)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_a_name_it_is_the_systems_folder(params, tmp_path, opened, monkeypatch, call):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    call(params)
    assert opened
    assert all(path.parent.parent == tmp_path for path in opened)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_has_no_room_is_refused_before_any_work(params, tmp_path, opened, monkeypatch, call):
    call(params, work_dir=tmp_path)
    needed = sum(opened.values())
    free(monkeypatch, needed)
    call(params, work_dir=tmp_path)
    free(monkeypatch, needed - 1)
    opened.clear()
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(InputError) as error:
        call(params, work_dir=tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: activations need 0.0 MiB")
    assert "work_dir" in message
    assert "\n" not in message
    assert not opened
    assert not list(tmp_path.iterdir())


def test_clustering_alone_needs_no_room(params, tmp_path, monkeypatch):
    free(monkeypatch, 0)
    compress(params, RUN, work_dir=tmp_path)


def test_bytes_needed_and_free_are_told_in_mebibytes(tmp_path, monkeypatch):
    free(monkeypatch, 3 * 2**20)
    with (
        pytest.raises(InputError, match=r"need 17,179\.9 MiB .* 3\.0 MiB are free; make room, or name another folder"),
        scratch_folder(tmp_path, 18_014_398_509),
    ):
        pytest.fail("there is no room")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_folder_that_is_none_is_refused(params, tmp_path, call):
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        with pytest.raises(InputError, match=f"{name}: is no folder for temporary files"):
            call(params, work_dir=tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written to"), scratch_folder(tmp_path, 0):
        pytest.fail("it cannot be written to")


def test_the_command_line_names_the_folder_too(tiny_model, tmp_path, opened, capsys, monkeypatch):
    np.save(tmp_path / "tokens.npy", np.arange(128, dtype=np.int32))
    (tmp_path / "work").mkdir()
    command = ["evaluate", str(tiny_model), "--context", "64", "--work-dir", str(tmp_path / "work")]
    scored = [*command, "--text", str(tmp_path / "tokens.npy")]
    assert main(scored) == 0
    assert [path.parent.parent for path in opened] == [tmp_path / "work"]
    capsys.readouterr()
    free(monkeypatch, 1)
    assert main(scored) == 2
    assert "choose another folder by --work-dir" in capsys.readouterr().err
    assert main([*command, "--exact-match", "x.jsonl"]) == 2
    assert "--work-dir" in capsys.readouterr().err


def test_compress_on_the_command_line_looks_for_room_in_the_output(tiny_model, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "tokens.npy", np.arange(256, dtype=np.int32))
    free(monkeypatch, 1)
    command = ["compress", str(tiny_model), "--out", str(tmp_path / "out")]
    assert (
        main(
            [
                *command,
                "--calibration",
                str(tmp_path / "tokens.npy"),
                "--samples",
                "2",
                "--length",
                "64",
                "--g",
                "4",
                "--num-codes",
                "16",
            ]
        )
        == 2
    )
    message = capsys.readouterr().err
    assert re.search(r"/out/work\S*: activations need 0\.3 MiB", message)
    assert not (tmp_path / "out").exists()
    assert "choose an output folder on another disk" in message
