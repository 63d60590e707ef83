"""A folder that appears whole or not at all."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from cluscomp_jax.checkpoint.new_folder import new_folder
from cluscomp_jax.errors import InputError, RunError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_it_appears_at_the_end(tmp_path: Path, there: bool) -> None:
    final = tmp_path / "out"
    if there:
        final.mkdir()
    with new_folder(final) as folder:
        (folder / "a").write_text("whole")
        assert not (final / "a").exists()
    assert names(tmp_path) == ["out"]
    assert (final / "a").read_text() == "whole"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_one_that_failed(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == []


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the disk is full; nothing is kept"), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RunError, match="writing failed: Input/output error"), new_folder(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "deep").mkdir(parents=True)
    (left / "a").write_text("half")
    with new_folder(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "out") as folder,
        pytest.raises(InputError, match="another process is writing there"),
        new_folder(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == ["out"]
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back
    os.close(lock)
    assert not folder.exists()


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "b").touch()
    for name, message in (
        ("file", "is not a folder"),
        ("full", r"not empty \(it holds b\)"),
        ("no/out", "does not exist"),
    ):
        with pytest.raises(InputError, match=message), new_folder(tmp_path / name):
            pass
    assert names(tmp_path) == ["file", "full"]


def test_a_folder_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    final = tmp_path / "out"

    def write() -> None:
        with new_folder(final) as folder:
            (folder / "a").touch()
            final.mkdir()
            (final / "theirs").touch()

    with pytest.raises(InputError, match="not empty"):
        write()
    assert names(final) == ["theirs"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("marker", ["manifest.json", "run.json"])
def test_no_folder_is_made_inside_a_checkpoint(tmp_path: Path, marker: str) -> None:
    (tmp_path / "model/blocks").mkdir(parents=True)
    (tmp_path / "model" / marker).write_text("{}")
    with pytest.raises(InputError, match="is inside the checkpoint"), new_folder(tmp_path / "model/blocks/out"):
        pass
    assert names(tmp_path / "model/blocks") == []


def test_a_link_is_followed_and_the_working_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("whole")
    assert names(tmp_path / "real") == ["a"]
    assert names(tmp_path) == ["link", "real"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="is the folder you are in"), new_folder(Path(".")):
        pass
