"""The core without the extras: the library works, and what needs an extra says so in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import HELPERS

REFUSED = """
import sys
sys.path.insert(0, {helpers!r})
from core_alone import Refuse
sys.meta_path.insert(0, Refuse(frozenset({allowed!r})))
"""

NEEDS = {
    "GGUF": (
        "import cluscomp_jax as cc; cc.open_model(sys.argv[1])",
        'a GGUF file needs gguf, which is not installed: pip install "cluscomp-jax[hf]"',
    ),
    "hub": (
        "import cluscomp_jax as cc; cc.open_model('owner/name')",
        "model 'owner/name' of the hub needs huggingface_hub, which is not installed: pip install \"cluscomp-jax[hf]\"",
    ),
    "data set": (
        "import cluscomp_jax as cc; cc.load_tokens('wikitext2', None)",
        "data set 'wikitext2' needs datasets, which is not installed: pip install \"cluscomp-jax[hf]\"",
    ),
    "tokenizer": (
        "import cluscomp_jax as cc; cc.open_model(sys.argv[2]).load_tokenizer()",
        'a tokenizer needs tokenizers, which is not installed: pip install "cluscomp-jax[hf]"',
    ),
    "report": (
        "import cluscomp_jax.reporting.html.page",
        'a report needs matplotlib, which is not installed: pip install "cluscomp-jax[report]"',
    ),
    "progress": (
        "from cluscomp_jax.runtime.reporter import console_reporter\nwith console_reporter(): pass",
        'a progress bar needs rich, which is not installed: pip install "cluscomp-jax[cli]"',
    ),
    "token cache": (
        "import cluscomp_jax.text.token_rows_cache",
        'a cache of tokens needs safetensors, which is not installed: pip install "cluscomp-jax[hf]"',
    ),
}


def run(code: str, *arguments: object, allowed: frozenset[str] = frozenset()) -> subprocess.CompletedProcess[str]:
    code = REFUSED.format(helpers=str(HELPERS), allowed=sorted(allowed)) + code
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_library_works(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(HELPERS / "core_alone.py"), str(tiny_model), str(tmp_path)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(("code", "line"), NEEDS.values(), ids=NEEDS)
def test_what_needs_an_extra_names_it(tiny_model: Path, tmp_path: Path, code: str, line: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    done = run(code, tmp_path / "model.gguf", tiny_model)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"cluscomp_jax.errors.InputError: {line}"


COMMANDS = {
    "nothing": (
        ["compress", "x"],
        frozenset(),
        'the command line needs tyro, which is not installed: pip install "cluscomp-jax[cli]"',
    ),
    "help": (
        ["--help"],
        frozenset(),
        'the command line needs tyro, which is not installed: pip install "cluscomp-jax[cli]"',
    ),
    "report": (
        ["report", "x"],
        frozenset({"tyro", "rich"}),
        'a report needs matplotlib, which is not installed: pip install "cluscomp-jax[report]"',
    ),
    "demo": (
        ["demo"],
        frozenset({"tyro", "rich"}),
        'a report needs matplotlib, which is not installed: pip install "cluscomp-jax[report]"',
    ),
    "hub": (
        ["generate", "owner/name", "--prompt", "a"],
        frozenset({"tyro", "rich"}),
        "model 'owner/name' of the hub needs huggingface_hub, which is not installed: pip install \"cluscomp-jax[hf]\"",
    ),
}


@pytest.mark.parametrize(("words", "allowed", "line"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_without_its_extra_ends_with_one_line_and_2(
    words: list[str], allowed: frozenset[str], line: str
) -> None:
    done = run("from cluscomp_jax.cli import main; sys.exit(main(sys.argv[1:]))", *words, allowed=allowed)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"cluscomp: error: {line}\n")


def test_the_version_needs_no_extra() -> None:
    done = run("from cluscomp_jax.cli import main; sys.exit(main(['--version']))")
    assert done.returncode == 0
    assert done.stdout.startswith("cluscomp ")


def test_the_harness_without_its_extra_ends_with_one_line_and_2() -> None:
    code = "import runpy; runpy.run_module('cluscomp_jax.evaluation.lm_eval', run_name='__main__')"
    done = run(code)
    line = 'the evaluation harness needs lm_eval, which is not installed: pip install "cluscomp-jax[lm-eval]"'
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
