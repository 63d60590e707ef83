"""Both parts of the tutorial, as they are written: every command and every block of Python."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from cluscomp_jax.cli import main


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.long
def test_the_commands(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(blocks("tutorial.md", "sh")).replace("\\\n", " ").splitlines()
    perplexities = []
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "cluscomp"
        assert main(arguments) == 0, line
        perplexities += re.findall(r"^perplexity (\S+) \(", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 10
    assert "tuned" in (checkout / "tutorial-tuned/report/report.html").read_text()
    assert len(perplexities) == 2  # without tuning, and of the export


@pytest.mark.long
def test_the_python(checkout: Path) -> None:
    code = blocks("tutorial_python.md", "python")
    assert len(code) == 4
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    assert (checkout / "tutorial-python/manifest.json").is_file()
