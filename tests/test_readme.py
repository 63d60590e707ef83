"""README.md: its length, and its Python, run as it is written."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MAX_WORDS = 1000
LAST_LINE = 45
"""The block of Python begins before this line of the file."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_it_is_short() -> None:
    assert len(README.split()) <= MAX_WORDS  # what `wc -w` counts


def test_the_python_comes_early() -> None:
    assert README.splitlines().index("```python") + 1 < LAST_LINE


def test_the_two_commands_are_there() -> None:
    lines = README.splitlines()
    for target in ("demo", "test"):
        assert any(line.split("#")[0].strip() == f"make {target}" for line in lines)
        assert f"\n{target}:" in MAKEFILE


def test_the_first_command_evaluates() -> None:
    commands = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    first = shlex.split(next(line for line in commands if line.startswith("cluscomp ")))
    assert first[:2] == ["cluscomp", "compress"]
    assert "--evaluate" in first


def test_the_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.long
def test_the_python(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    imports = {line.split()[1] for line in code.splitlines() if line.startswith(("import", "from"))}
    assert imports == {"cluscomp_jax"}
    assert re.search(r"\bcc\.\w+\.\w+\(", code) is None  # names of the top level alone
    names: dict[str, Any] = {}
    exec(code, names)
    first, second = capsys.readouterr().out.splitlines()
    bits, perplexity = first.removesuffix(" bits per weight"), second.removeprefix("perplexity ")
    assert 0.99 * 2.6 <= float(bits) <= 2.6
    assert float(perplexity) == pytest.approx(73.91, rel=0.03)  # the last digits depend on the machine
    assert (checkout / "small-python/manifest.json").is_file()
