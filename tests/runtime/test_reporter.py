import json
import math
from pathlib import Path

import pytest

from cluscomp_jax.runtime import reporter as reporter_module
from cluscomp_jax.runtime.reporter import JsonLinesLog, SilentReporter, console_reporter, to_json


def test_records_are_lines_of_strict_json_and_the_file_comes_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with console_reporter(JsonLinesLog(path)) as reporter:
        assert not path.exists()
        reporter.record("block", loss=math.nan, errors=(1.0, 2.0))
        reporter.record("block", loss=0.5)
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())
    assert (first["event"], first["loss"], first["errors"]) == ("block", None, [1.0, 2.0])
    assert second["loss"] == 0.5
    assert second["time"] >= first["time"]


def test_a_new_reporter_begins_the_file_anew_and_a_time_given_stands(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "block", "los')
    for _ in range(2):
        with console_reporter(JsonLinesLog(path)) as reporter:
            reporter.record("block", time=1.5)
            reporter.record("block", time=2.5)
        assert [json.loads(line)["time"] for line in path.read_text().splitlines()] == [1.5, 2.5]


def test_a_warning_is_one_line_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with console_reporter() as reporter:
        reporter.start("tune", 4, "steps")
        reporter.warn("[bold] " + "x" * 200)
    SilentReporter().warn("nothing")
    assert capsys.readouterr() == ("", "[bold] " + "x" * 200 + "\n")


def test_without_a_terminal_progress_is_lines_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter_module, "_LINE_EVERY_S", 0.0)
    with console_reporter() as reporter:
        reporter.start("tune", 4, "steps")
        reporter.advance(3)
    line = capsys.readouterr().err
    assert line.startswith("tune: 3/4 steps, ")
    assert "steps/s" in line
    assert line.endswith("s left\n")


def test_stages_follow_each_other_and_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console_reporter() as reporter:
        reporter.advance()
        for stage in ("one", "two"):
            reporter.start(stage, 1, "steps")
            reporter.advance(note="x")
        reporter.record("nothing is written without a log")
    silent = SilentReporter()
    silent.start("one", 1, "steps")
    silent.advance()
    silent.record("x", y=1)
    assert capsys.readouterr() == ("", "")


def test_json_has_sorted_keys_and_no_constants() -> None:
    assert (
        to_json({"b": {"c": -math.inf}, "a": [1, True, "x", None]}) == '{"a": [1, true, "x", null], "b": {"c": null}}'
    )
