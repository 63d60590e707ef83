"""`scripts/check_card.py` without a GPU: the dry run whole, and how its parent treats steps that hang or crash."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

SCRIPT = ROOT / "scripts" / "check_card.py"
STEPS = ["values", "kmeans", "model", "kernels", "generation"]

# Python runs this first in every process that has its folder on PYTHONPATH.
FORBID = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"gguf", "tyro", "rich", "matplotlib", "jinja2", "datasets"}:
            raise ImportError(f"{name} is forbidden here")
sys.meta_path.insert(0, Forbid())
"""


def start(out, *options, **environment):
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(out, *options, **environment):
    process = start(out, *options, **environment)
    printed, said = process.communicate()
    return process.returncode, printed, said


@pytest.mark.long
def test_the_dry_run_tells_everything_without_the_packages_that_a_card_may_lack(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FORBID)
    hooks = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    refused = subprocess.run(
        [sys.executable, "-c", "import rich"], env=os.environ | hooks, check=False, capture_output=True, text=True
    )
    assert "rich is forbidden here" in refused.stderr
    out = tmp_path / "card.json"
    code, printed, said = run(out, "--dry", "--seconds", "1800", **hooks)
    assert (code, said) == (0, ""), printed
    card = json.loads(out.read_text())
    assert card["finished"]
    assert {name: step["status"] for name, step in card["steps"].items()} == dict.fromkeys(STEPS, "done")
    judged = [fact for step in card["steps"].values() for fact in step["facts"] if "right" in fact]
    assert len(judged) >= 14
    assert all(fact["right"] is True for fact in judged)
    assert card["device"]["platform"] == "cpu"
    assert card["versions"]["jax"]
    assert f"{len(judged)} of {len(judged)} values right" in printed
    (tile,) = json.loads((tmp_path / "card.tiles.json").read_text())
    assert set(tile) == {"product", "tile"}


def wrong_input(out, *options):
    code, printed, said = run(out, *options)
    assert (code, printed) == (2, "")
    return said.splitlines()[-1]


@pytest.mark.parametrize("name", ["card.json", "card.tiles.json"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert f"{name} is there and nothing is overwritten" in wrong_input(tmp_path / "card.json", "--dry")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_other_wrong_inputs_are_told_in_one_line(tmp_path):
    assert "invalid choice: 'nothing'" in wrong_input(tmp_path / "card.json", "--dry", "--only", "nothing")
    assert "it must be a number above 0" in wrong_input(tmp_path / "card.json", "--dry", "--seconds", "0")
    assert "is no folder" in wrong_input(tmp_path / "nowhere" / "card.json", "--dry")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_wrong_input(tmp_path):
    assert "there is no NVIDIA GPU" in wrong_input(tmp_path / "card.json")
    assert not list(tmp_path.iterdir())


FACT = 'import os, time; os.write(int(os.environ[\'CHECK_CARD_FD\']), b\'{"name": "first", "right": true}\\n\');'


@pytest.fixture
def fake_step(tmp_path, monkeypatch):
    """Runs a step of this Python code under the parent's own function; returns what the file says of it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from check_card import card, command

    def fake(code, limit=60.0):
        out = tmp_path / "card.json"
        found = card.Card(out, {}, ["values", "kmeans"])
        command.run_step(found, "values", [sys.executable, "-c", code], limit, os.environ)
        written = json.loads(out.read_text())
        assert written == found.content
        assert written["steps"]["kmeans"] == {"status": "not begun", "seconds": 0.0, "facts": []}
        return written["steps"]["values"]

    return fake


def test_a_step_that_hangs_is_killed_and_its_facts_are_kept(fake_step):
    began = time.monotonic()
    step = fake_step(f"{FACT} time.sleep(600)", limit=3.0)
    assert time.monotonic() - began < 60
    assert step["status"] == "timed out"
    assert "had not ended after 3 s" in step["reason"]
    assert [fact["name"] for fact in step["facts"]] == ["first"]


def test_a_step_that_closes_its_pipe_and_hangs_is_killed_too(fake_step):
    step = fake_step(f"{FACT} os.close(int(os.environ['CHECK_CARD_FD'])); time.sleep(600)", limit=3.0)
    assert (step["status"], len(step["facts"])) == ("timed out", 1)


CRASHES = {
    "exception": ("raise ValueError('as planned')", "ValueError: as planned"),
    "signal": ("os.kill(os.getpid(), 9)", "killed by signal 9"),
    "silence": ("os._exit(3)", "exit status 3"),
}


@pytest.mark.parametrize(("code", "reason"), CRASHES.values(), ids=CRASHES)
def test_a_step_that_crashes_is_recorded_with_its_last_words(fake_step, code, reason):
    step = fake_step(f"{FACT} {code}")
    assert (step["status"], step["reason"], len(step["facts"])) == ("failed", reason, 1)


def test_half_a_fact_is_no_fact(fake_step):
    step = fake_step(f"{FACT} os.write(int(os.environ['CHECK_CARD_FD']), b'{{\"name\": \"sec')")
    assert (step["status"], len(step["facts"])) == ("done", 1)


def test_a_wrong_value_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from check_card import card, command

    found = card.Card(tmp_path / "card.json", {}, ["values"])
    found.begin("values", 1.0)
    found.add("values", {"name": "first", "right": True})
    found.end("values", card.DONE, 0.5)
    assert command.verdict(found, ["values"]) == 0
    found.add("values", {"name": "second", "right": False})
    assert command.verdict(found, ["values"]) == 1


def test_a_run_that_is_killed_leaves_what_it_found(tmp_path):
    out = tmp_path / "card.json"
    process = start(out, "--dry", "--only", "values")
    for line in process.stdout:
        if line.startswith("values: device"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    card = json.loads(out.read_text())
    assert not card["finished"]
    assert card["device"]["platform"] == "cpu"
    assert card["steps"]["values"]["status"] == "running"
    assert card["steps"]["generation"]["status"] == "not begun"
