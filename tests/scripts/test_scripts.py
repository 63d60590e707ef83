"""The Makefile's list of targets, and the script that makes the environments, short of making one."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

# What a Debian without python3-venv does: the interpreter is linked, then `-m ensurepip` fails in it.
WITHOUT_ENSUREPIP = """
import runpy, subprocess, sys, venv
def create(*args, **kwargs):
    raise subprocess.CalledProcessError(1, [sys.executable, "-m", "ensurepip"])
venv.create = create
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert sorted(line.split(": ")[0] for line in listing.splitlines()) == sorted(phony[1].split())


def test_a_python_that_cannot_install_pip_is_told_what_to_install(tmp_path):
    command = [sys.executable, "-c", WITHOUT_ENSUREPIP, ROOT / "scripts" / "make_venv.py", tmp_path / "env"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("apt install python3-venv")


RECORDER = """#!/usr/bin/env bash
echo "$1" >> "$CALLS"
command=("$@")
for i in "${!command[@]}"; do
  case "${command[$i]}" in --config | --finetune-config) [ -f "${command[$((i + 1))]}" ] || exit 2 ;; esac
done
case "$1" in
  compress | finetune) while [ "$1" != --out ]; do shift; done; mkdir -p "$2"; touch "$2/manifest.json";;
  evaluate) [ ! -f "$CALLS.stop" ];;
esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("bits", ["1", "2", "4"])
@pytest.mark.parametrize("name", ["compress", "finetune"])
def test_the_scripts_of_a_card_go_on_where_they_were_stopped(tmp_path, name, bits):
    fake, calls, stop = tmp_path / "cluscomp", tmp_path / "calls", tmp_path / "calls.stop"
    fake.write_text(RECORDER)
    fake.chmod(0o755)
    stop.touch()
    out = str(tmp_path / "out")
    data = [] if name == "compress" else ["data.jsonl"]
    command = ["bash", str(ROOT / f"scripts/{name}_70b_a6000.sh"), "model", *data, out, bits]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(calls)}
    assert subprocess.run(command, env=env, check=False).returncode != 0  # stopped while it evaluates
    stop.unlink()
    assert subprocess.run(command, env=env, check=False).returncode == 0
    assert calls.read_text().split() == ["plan", name, "evaluate", "plan", "evaluate"]
