"""Disks that are full, read-only or failing while a checkpoint is written."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checkpoint_runs import CONFIG, assert_same, assert_whole, run, writer
from toy_checkpoint import ToyConfig, ToyRun, toy_block, toy_params

from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.reader import load_checkpoint, open_checkpoint, save_checkpoint
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.models.activations import ActivationStore
from cluscomp_jax.runtime import atomic


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_target_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, code):
    def refused(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refused)
        with pytest.raises(InputError, match=f"cannot be written to: {os.strerror(code)}; choose another folder"):
            writer(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 48 bytes: No space left on device [os_error_code='28']"),
    ],
)
def test_a_full_disk_ends_the_run_so_that_it_resumes(tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    out = tmp_path / "out"
    for step in ((orbax_items, "write_item"), (atomic, "publish")):
        with writer(out) as w:
            if not w.finished_blocks:
                w.store_block(0, toy_block(CONFIG, 0))
            with monkeypatch.context() as patched:
                patched.setattr(*step, full)
                with pytest.raises(RunError, match="disk is full; make room"):
                    w.store_block(1, toy_block(CONFIG, 1))
        with pytest.raises(InputError):
            open_checkpoint(out)
    run(out)
    assert_whole(out)


def test_a_failing_disk_is_told_from_a_full_one_and_from_our_mistakes(tmp_path):
    with pytest.raises(RunError, match="writing failed: Input/output error"), atomic.writing(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(ZeroDivisionError), atomic.writing(tmp_path):
        raise ZeroDivisionError


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if not mount or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_on_a_disk_that_is_really_full_and_really_read_only(small_disk):
    config = ToyConfig(num_blocks=6)
    out = small_disk / "out"
    with pytest.raises(RunError, match="the disk is full"):
        save_checkpoint(out, toy_params(config), ToyRun(config))
    with pytest.raises(InputError, match="an unfinished run"):
        open_checkpoint(out)
    remount(small_disk, "size=10m")
    save_checkpoint(out, toy_params(config), ToyRun(config))
    assert_same(load_checkpoint(out).params, toy_params(config))
    remount(small_disk, "size=1m")
    with pytest.raises(OSError, match=r"No space left on device: 64.0 MiB of activations are needed"):
        ActivationStore(small_disk / "stream.bin", (4, 1024, 4096), np.float32)
    assert not (small_disk / "stream.bin").exists()
    remount(small_disk, "ro")
    with pytest.raises(InputError, match="cannot be written to: Read-only file system"):
        writer(small_disk / "other")
    load_checkpoint(out)
