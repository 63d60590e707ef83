"""Records as TensorBoard's scalars."""

import errno
import os
import sys

import pytest
from event_files import scalars
from tensorboardX.event_file_writer import EventsWriter

from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.runtime.reporter import console_reporter
from cluscomp_jax.runtime.tensorboard import TensorBoardLog, remove_scalars


def test_numbers_of_records_with_a_step_are_scalars_of_the_last_writer(tmp_path):
    folder = tmp_path / "tensorboard"
    for repeat in (1, 2):
        with console_reporter(TensorBoardLog(folder)) as reporter:
            reporter.record("note", text="no step")
            for step in range(1, 2 + repeat):
                reporter.record("step", step=step, loss=step / 4, kind="text", time=100.0 + step)
            reporter.record("evaluation", step=2, nll=1.5, time=200.0)
        wanted = {("step/loss", step): (step / 4, 100.0 + step) for step in range(1, 2 + repeat)}
        assert scalars(folder) == {**wanted, ("evaluation/nll", 2): (1.5, 200.0)}


def test_what_is_not_ours_stays(tmp_path):
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "events.out.tfevents.1.host").write_text("half")
    remove_scalars(folder)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    with console_reporter(TensorBoardLog(folder)) as reporter:
        reporter.record("step", step=1, loss=1.0)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("call", ["write_event", "flush"])
def test_a_full_disk_ends_the_run_with_one_line(tmp_path, monkeypatch, call):
    def full(*_):
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run():
        with console_reporter(TensorBoardLog(tmp_path / "tensorboard")) as reporter:
            reporter.record("step", step=0, loss=1.0)
            monkeypatch.setattr(EventsWriter, call, full)
            for step in range(1, 100):
                reporter.record("step", step=step, loss=1.0)

    with pytest.raises(RunError, match="tensorboard: the disk is full"):
        run()
    assert len(scalars(tmp_path / "tensorboard")) < 3


@pytest.mark.parametrize("error", [ValueError("the work"), None])
def test_a_log_that_cannot_be_closed_hides_nothing(error):
    closed = []

    class Log:
        def close(self):
            closed.append(self)
            raise RunError("the log")

    def run():
        with console_reporter(Log(), Log()):
            if error is not None:
                raise error

    with pytest.raises((ValueError, RunError), match="the work" if error else "the log"):
        run()
    assert len(closed) == (2 if error else 1)


def test_nothing_is_made_before_there_is_something_to_write(tmp_path):
    with console_reporter(TensorBoardLog(tmp_path / "tensorboard")) as reporter:
        reporter.record("note", text="no step")
    assert not any(tmp_path.iterdir())


def test_the_extra_is_named_where_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    with pytest.raises(
        InputError, match=r'--tensorboard needs tensorboardX, .* pip install "cluscomp-jax\[tensorboard\]"'
    ):
        TensorBoardLog(tmp_path)
