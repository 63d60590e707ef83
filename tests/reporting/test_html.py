"""The report of a small run: what is on the page, that it needs nothing from outside, and that a browser shows it."""

import dataclasses
import html.parser
import itertools
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import write_model, write_text
from export_models import coded, decoded
from scipy import stats

from cluscomp_jax.checkpoint.writer import CheckpointWriter
from cluscomp_jax.cli import main
from cluscomp_jax.errors import InputError
from cluscomp_jax.reporting.html.codes import code_use
from cluscomp_jax.reporting.html.comparison import comparison_notices
from cluscomp_jax.reporting.html.figures import draw_run
from cluscomp_jax.reporting.html.page import write_report
from cluscomp_jax.reporting.html.records import read_records

OPTIONS = ["--samples", "4", "--length", "16", "--epochs", "1", "--g", "4", "--num-codes", "8"]
FIGURES = {"sizes", "perplexity", "losses", "errors", "bits", "usage", "kurtosis", "stages"}
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(html.parser.HTMLParser):
    """The words of a page and everything it points to."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "xlink:href", "src", "srcset", "action", "data", "poster"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def compress_argv(folder: Path, out: Path) -> list[str]:
    calibration, test = str(folder / "calibration.txt"), str(folder / "test.txt")
    argv = ["compress", str(folder / "model"), "--calibration", calibration, "--out", str(out), *OPTIONS]
    return [*argv, "--config", str(folder / "run.toml"), "--evaluate", test, "--context", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_model(folder / "model")
    # Error feedback changes no record's form, and compiling it would take half of the time.
    (folder / "run.toml").write_text("[cluster]\nerror_feedback = false\n")
    write_text(folder / "calibration.txt", 400)
    write_text(folder / "test.txt", 200, seed=1)
    assert main(compress_argv(folder, folder / "run<&>")) == 0
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return write_report(folder / "run<&>", folder / "page")


def test_every_figure_is_on_the_page_and_a_png(page: Path) -> None:
    parsed = Page(page.read_text())
    assert parsed.tags.count("svg") == len(FIGURES)
    assert {path.stem for path in page.parent.glob("*.png")} == FIGURES
    for file in page.parent.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG\r\n")
    assert {path.name for path in page.parent.iterdir()} == {"report.html", *(f"{name}.png" for name in FIGURES)}


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    parsed = Page(page.read_text())
    assert parsed.references
    assert all(reference.startswith(("#", "data:")) for reference in parsed.references), parsed.references
    assert "script" not in parsed.tags
    assert "@import" not in page.read_text()


def test_the_page_says_what_was_measured(folder: Path, page: Path) -> None:
    manifest = json.loads((folder / "run<&>/manifest.json").read_text())
    text = Page(page.read_text()).text
    assert "run<&>: model compressed" in text  # a name is shown as it is, and is no markup
    for value in (
        f"{manifest['totals']['bits_per_weight']:.3f}",
        f"{manifest['metrics']['perplexity']['original']['perplexity']:.3f}",
        f"{manifest['metrics']['perplexity']['compressed']['perplexity']:.3f}",
        "4 x 16 tokens",
        '"num_codes": 8',
        f"jax {manifest['provenance']['versions']['jax']}",
        "--num-codes 8",
        "Settings by projection",
    ):
        assert value in text, value
    for path in manifest["matrices"]:
        assert path in text


def test_stages_measured_later_join_the_report_of_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, clustered = tmp_path / "tuned", tmp_path / "clustered"
    shutil.copytree(folder / "run<&>", run)
    before = read_records(run)
    assert (list(before.perplexity), before.stage) == (["original", "tuned"], "tuned")
    assert before.unmeasured == ["clustered", "corrected"]
    assert "Not measured: clustered, corrected" in Page(write_report(run).read_text()).text
    blind = ["compress", str(folder / "model"), "--g", "4", "--num-codes", "8", "--out", str(clustered)]
    assert main(blind) == 0
    capsys.readouterr()
    argv = ["evaluate", str(clustered), "--text", str(folder / "test.txt"), "--context", "16", "--json"]
    assert main([*argv, "--record", str(run)]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    after = read_records(run)
    assert list(after.perplexity) == ["original", "clustered", "tuned"]
    assert after.perplexity["clustered"]["perplexity"] == measured["perplexity"]
    assert after.unmeasured == ["corrected"]
    assert main([*argv[:-1], "--record", str(run), "--tokens", "32"]) == 0  # of another text: it stays out
    assert read_records(run).perplexity["clustered"]["perplexity"] == measured["perplexity"]
    original = ["evaluate", str(folder / "model"), "--text", str(folder / "test.txt"), "--context", "16", "--json"]
    assert main([*original, "--record", str(run)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stage"] == "original"
    assert main(["inspect", str(run)]) == 0
    assert capsys.readouterr().out.count("clustered, noted from") == 2


def test_a_model_that_is_no_stage_of_the_run_is_not_noted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run<&>", run)
    write_model(tmp_path / "other", rope_theta=99.0)
    argv = ["evaluate", str(tmp_path / "other"), "--text", str(folder / "test.txt"), "--context", "16", "--record"]
    assert main([*argv, str(run)]) == 2
    assert "nor made from the same files" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "other")]) == 2
    assert not (run / "evaluations.jsonl").exists()
    (run / "evaluations.jsonl").write_text('{"stage": "tuned", "perplexity": "low"}\n')
    assert main(["report", str(run)]) == 2
    assert "evaluations.jsonl line 1: is no record" in capsys.readouterr().err


def test_a_run_without_perplexity_names_the_command_that_adds_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    assert main(["compress", str(folder / "model"), "--g", "4", "--num-codes", "8", "--out", str(run)]) == 0
    text = Page(write_report(run).read_text()).text
    command = re.search(r"This command adds it: cluscomp (.*?) \(then cluscomp report (.*?)\)", text)
    assert command is not None
    argv = [str(folder / "test.txt") if word == "TEXT" else word for word in shlex.split(command[1])]
    assert main([*argv, "--context", "16"]) == 0
    assert main(["report", *shlex.split(command[2])]) == 0
    after = Page((run / "report" / "report.html").read_text()).text
    assert "No perplexity" not in after
    assert (
        "Not measured: original. This command adds a stage: cluscomp evaluate MODEL --text TEXT --context 16" in after
    )
    capsys.readouterr()


@pytest.mark.parametrize("settings", [[(2, 32)], [(2, 32), (3, 256)]])
def test_a_budget_shows_the_settings_that_it_gave(folder: Path, settings: list[tuple[int, int]]) -> None:
    run = read_records(folder / "run<&>")
    matrices = [
        {**matrix, "g": g, "num_codes": n}
        for matrix, (g, n) in zip(run.matrices, itertools.cycle(settings), strict=False)
    ]
    rule = {**run.run_config["cluster"]["rules"][0], "group_size": 4, "num_codes": 65500}
    other = {**rule, "pattern": "nothing"}
    config = {**run.run_config, "cluster": {**run.run_config["cluster"], "bits": 2.6, "rules": [rule, other]}}
    budget = dataclasses.replace(run, matrices=matrices, run_config=config)
    *found, unused = budget.resolved_config["cluster"]["rules"]
    assert [(entry["group_size"], entry["num_codes"]) for entry in found] == settings
    assert sum(entry["matrices"] for entry in found) == len(matrices)
    assert unused == {"pattern": "nothing", "axis": "out"}
    assert budget.resolved_config["tuning"] == run.run_config["tuning"]
    assert run.resolved_config == run.run_config


def test_the_settings_of_a_budget_reach_the_page(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["compress", str(folder / "model"), "--bits", "6", "--out", str(run)]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert "65500" in json.dumps(manifest["run_config"])
    text = Page(write_report(run).read_text()).text
    assert "65500" not in text
    for matrix in manifest["matrices"].values():
        assert f'"group_size": {matrix["group_size"]}' in text
        assert f'"num_codes": {matrix["num_codes"]}' in text


def _matrix_records(shape: tuple[int, int], projections: int, blocks: int) -> list[dict[str, Any]]:
    index = 5 * shape[0] * shape[1] // 2
    return [
        {
            "path": f"model/layers/{i}/p{j}/kernel", "shape": shape, "g": 2, "num_codes": 32, "axis": "out",
            "bits": index + 16 * 64, "bits_per_weight": 2.6,
        }
        for i in range(blocks) for j in range(projections)
    ]  # fmt: skip


def _loss_records(blocks: int) -> list[dict[str, Any]]:
    return [
        {"index": i, "loss_before": 10.0 ** (i - 4), "loss_after": 9.0 ** (i - 4), "epoch_losses": [
            1.1 * 10.0 ** (i - 4), 0.9 * 10.0 ** (i - 4)]}
        for i in range(blocks)
    ]  # fmt: skip


@pytest.mark.parametrize(("projections", "blocks"), [(1, 1), (7, 5), (7, 64), (20, 3)])
def test_no_legend_covers_bars_lines_or_titles(folder: Path, projections: int, blocks: int) -> None:
    run = dataclasses.replace(
        read_records(folder / "run<&>"),
        num_blocks=blocks,
        matrices=_matrix_records((64, 64), projections, blocks),
        blocks=_loss_records(blocks),
    )
    drawn = {drawing.name: drawing for drawing in draw_run(run, {})}
    for name in ("sizes", "losses"):
        figure = drawn[name].figure
        figure.canvas.draw()
        (axes, *_) = figure.axes
        legend = axes.get_legend()
        assert legend is not None
        box = legend.get_window_extent()
        assert not box.overlaps(axes.get_window_extent())  # all bars and lines are inside the axes
        assert not box.overlaps(axes._left_title.get_window_extent()) or not axes.get_title("left")
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1)


def test_the_sizes_are_those_of_the_records_where_codebooks_are_tied(folder: Path) -> None:
    owner, tied = _matrix_records((1024, 1024), 2, 1)
    index = tied["bits"] - 16 * 64
    run = dataclasses.replace(read_records(folder / "run<&>"), matrices=[owner, {**tied, "bits": index}])
    (axes,) = draw_run(run, {})[0].figure.axes
    dense, indices, books = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert dense == [2.0, 2.0]  # MiB
    assert indices == [index / 8 / 2**20] * 2
    assert books == [16 * 64 / 8 / 2**20, 0.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["p0", "p1"]


def test_the_course_of_tuning_is_drawn_relative_to_its_start(folder: Path) -> None:
    blocks = [*_loss_records(5), {"index": 5, "loss_before": 1.0, "epoch_losses": [None]}]
    run = dataclasses.replace(read_records(folder / "run<&>"), blocks=blocks)
    drawing = next(drawing for drawing in draw_run(run, {}) if drawing.name == "losses")
    below = drawing.figure.axes[1]
    assert below.get_yscale() == "linear"
    assert below.get_ylabel() == "loss / loss at epoch 0"
    courses = {line.get_label(): line.get_ydata() for line in below.get_lines() if line.get_label().startswith("block")}
    assert list(courses) == [f"block {i}" for i in range(5)]  # the loss of block 5 is not finite
    for course in courses.values():
        np.testing.assert_allclose(course, [1.0, 1.1, 0.9])


def test_a_report_may_be_made_again_but_nothing_else_is_overwritten(folder: Path, page: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    shutil.copytree(page.parent, out)
    assert write_report(folder / "run<&>", out).read_text() == page.read_text()
    (out / "mine.txt").touch()
    with pytest.raises(InputError, match=r"holds mine\.txt"):
        write_report(folder / "run<&>", out)
    with pytest.raises(InputError, match="does not exist"):
        write_report(folder / "run<&>", tmp_path / "no" / "where")


def test_an_unfinished_run_shows_what_there_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = CheckpointWriter.store_block

    def interrupted(writer: CheckpointWriter, i: int, tree: Any) -> None:
        if i == 1:
            raise KeyboardInterrupt
        whole(writer, i, tree)

    monkeypatch.setattr(CheckpointWriter, "store_block", interrupted)
    out = tmp_path / "out"
    assert main(compress_argv(folder, out)) == 1
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "block", "ind')  # a process killed while it wrote
    assert main(["report", str(out), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fields["page"] == str(out / "report" / "report.html")
    text = Page(Path(fields["page"]).read_text()).text
    assert "unfinished: 1 of 2 blocks are done" in text
    assert {Path(figure).stem for figure in fields["figures"]} == {"sizes", "losses", "errors", "bits"}
    assert main(["compare", str(out), str(folder / "run<&>")]) == 0
    assert "out is unfinished: 1 of 2 blocks" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(compress_argv(folder, out)) == 0  # the report in the folder does not keep the run from resuming


def test_runs_are_laid_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run<&>")
    assert main(["compare", run, run, "--out", str(tmp_path / "c"), "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    fields = json.loads(last)
    assert [entry["bits_per_weight"] for entry in fields["runs"]] == [read_records(run).bits_per_weight] * 2
    assert sum(line.startswith("run<&> ") for line in table) == 2
    page = Page(Path(fields["page"]).read_text())
    assert page.tags.count("svg") == 1
    assert all(reference.startswith(("#", "data:")) for reference in page.references)


def test_perplexities_of_different_texts_are_not_compared(folder: Path) -> None:
    run = read_records(folder / "run<&>")
    other = {name: {**measured, "context": 99} for name, measured in run.perplexity.items()}
    assert comparison_notices([run, run]) == []
    (notice,) = comparison_notices([run, dataclasses.replace(run, perplexity=other)])
    assert "cannot be compared" in notice


def test_wrong_input_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "model")]) == 2
    assert "neither manifest.json nor run.json" in capsys.readouterr().err
    assert main(["compare", str(folder / "run<&>")]) == 2
    assert "two folders or more" in capsys.readouterr().err


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_use_of_codes_is_that_of_the_decoded_weights(axis: Any) -> None:
    matrix = coded(np.random.default_rng(0), (12, 16), g=4, n=40, axis=axis)
    use = code_use(matrix)
    counts = np.unique(matrix.index, return_counts=True)[1]
    assert use.used == len(counts) / 40
    assert use.effective == pytest.approx(np.exp(stats.entropy(counts)) / 40)
    assert use.kurtosis == pytest.approx(stats.kurtosis(decoded(matrix).astype(float), axis=None, fisher=False))


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_without_complaint(page: Path, tmp_path: Path, width: int) -> None:
    probe = tmp_path / "probe.html"
    script = "<script>document.body.dataset.width = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    command = [
        str(_CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        f"--window-size={width},900",
        "--dump-dom",
        probe.as_uri(),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in done.stderr, done.stderr
    wide, inner = map(int, re.search(r'data-width="(\d+) of (\d+)"', done.stdout).groups())  # type: ignore[union-attr]
    assert inner <= width
    assert wide <= inner  # nothing makes the page scroll sideways
