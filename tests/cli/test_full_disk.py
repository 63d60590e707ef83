"""Commands whose files cannot be written: one line, exit code 1, nothing stray, and nothing measured is lost."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluscomp_jax.cli import main
from cluscomp_jax.runtime import atomic

TEXT = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    out = tmp_path_factory.mktemp("full") / "c"
    assert main(["compress", str(tiny_model), "--bits", "3", "--no-tuning", "--out", str(out)]) == 0
    return out


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from cluscomp_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="file sizes are limited as Linux does")
@pytest.mark.parametrize(
    "line",
    [
        "report C --out OUT",
        "export C --format dense --out OUT",
        "export C --format orbax --out OUT",
        "export C --format orbax-codebook --out OUT",
        "compress M --bits 3 --no-tuning --out OUT",
        f"finetune C --data {TEXT} --length 64 --steps 1 --out OUT",
    ],
)
def test_a_file_that_cannot_be_written(tmp_path: Path, compressed: Path, tiny_model: Path, line: str) -> None:
    names = {"C": str(compressed), "M": str(tiny_model), "OUT": str(tmp_path / "out")}
    argv = [names.get(word, word) for word in line.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"cluscomp: error: {tmp_path / 'out'}")
    assert "Traceback" not in done.stderr
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept in ([], ["out"])
    assert not (tmp_path / "out" / "manifest.json").exists()
    if kept:  # it resumes
        assert argv[0] in ("compress", "finetune")


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_perplexity_that_cannot_be_noted_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compressed: Path, reason: int
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(atomic, "sync", refuse)
    before = sorted(compressed.iterdir())
    argv = ["evaluate", str(compressed), "--text", str(TEXT), "--context", "64", "--tokens", "128"]
    assert main([*argv, "--record", str(compressed)]) == 1
    out, err = capsys.readouterr()
    assert "perplexity" in out
    assert "not noted" in err.splitlines()[-1]
    assert "evaluations.jsonl" in err.splitlines()[-1]
    assert sorted(compressed.iterdir()) == before


def test_an_earlier_report_outlives_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, compressed: Path
) -> None:
    argv = ["report", str(compressed), "--out", str(tmp_path / "r")]
    assert main(argv) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    write, written = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(argv) == 1
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before
