"""Records as TensorBoard's scalars, read back from the event file by its published framing."""

import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from cluscomp_jax.errors import InputError
from cluscomp_jax.progress import console_reporter
from cluscomp_jax.tensorboard import TensorBoardLog


def scalars(folder):
    """{(tag, step): (value, wall time)} of the one file in a folder: length, its checksum, an Event, its checksum."""
    (file,) = folder.iterdir()
    raw, at, found = file.read_bytes(), 0, {}
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        event = Event.FromString(raw[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            found[value.tag, event.step] = (value.simple_value, event.wall_time)
    return found


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


def test_nothing_is_made_before_there_is_something_to_write(tmp_path):
    with console_reporter(TensorBoardLog(tmp_path / "tensorboard")) as reporter:
        reporter.record("note", text="no step")
    assert not any(tmp_path.iterdir())


def test_the_extra_is_named_where_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"pip install 'cluscomp-jax\[tensorboard\]'"):
        TensorBoardLog(tmp_path)
