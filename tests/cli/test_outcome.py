import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from cluscomp_jax.cli import main
from cluscomp_jax.cli.outcome import Result, run
from cluscomp_jax.errors import InputError, RunError


def failing(error: BaseException) -> Callable[[], Result]:
    def command() -> Result:
        raise error

    return command


CASES: dict[str, tuple[BaseException, int, str]] = {
    "wrong input": (InputError("g is 0"), 2, "g is 0"),
    "failed run": (RunError("the disk is full"), 1, "the disk is full; give the same command again to resume"),
    "no such file": (FileNotFoundError(2, "No such file", "x.txt"), 2, "[Errno 2] No such file: 'x.txt'"),
    "not allowed": (PermissionError(13, "Permission denied", "x"), 2, "[Errno 13] Permission denied: 'x'"),
    "read-only disk": (
        OSError(errno.EROFS, "Read-only file system"),
        2,
        f"[Errno {errno.EROFS}] Read-only file system",
    ),
    "full disk": (OSError(errno.ENOSPC, "No space left"), 1, "No space left; give the same command again to resume"),
    "keyboard": (KeyboardInterrupt(), 1, "stopped by the keyboard; give the same command again to resume"),
    "anything else": (ZeroDivisionError("by\nzero"), 1, "ZeroDivisionError: by zero (--debug shows where)"),
}


@pytest.mark.parametrize(("error", "code", "text"), CASES.values(), ids=CASES)
def test_an_error_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    assert run(failing(error), json=True, debug=False, resumable=True) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cluscomp: error: ")
    assert err.endswith(f"{text}\n")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(InputError("g is 0")), json=False, debug=True, resumable=False) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("cluscomp: error: g is 0\n")


def test_a_termination_signal_ends_the_command_like_the_keyboard(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def command() -> Result:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not arrive")

    assert run(command, json=False, debug=False, resumable=False) == 1
    assert capsys.readouterr().err == "cluscomp: error: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_json_is_the_last_line_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result("a table\nof two lines", {"perplexity": float("inf"), "list": (1, float("nan"))})
    assert run(lambda: result, json=True, debug=False, resumable=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["a table", "of two lines"]
    assert json.loads(lines[-1], parse_constant=pytest.fail) == {"perplexity": None, "list": [1, None]}


@pytest.mark.parametrize(
    "argv", [[], ["compres"], ["compress", "m"], ["evaluate", "m", "--text", "t", "--context", "x"]]
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err


@pytest.mark.parametrize("command", ["compress", "evaluate", "generate", "inspect", "demo"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--debug" in out


def test_help_loads_nothing_heavy() -> None:
    check = (
        "import sys; from cluscomp_jax.cli import main; assert main(['compress', '--help']) == 0; "
        "heavy = {'jax', 'numpy', 'transformers', 'orbax', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, timeout=60)


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    program = (
        "import sys; from cluscomp_jax.cli.outcome import Result, run; "
        "sys.exit(run(lambda: Result('x' * 200_000, {}), json=False, debug=False, resumable=False))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cluscomp_jax", "compres"], capture_output=True, timeout=60)
    assert done.returncode == 2
