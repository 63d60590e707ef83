"""What is said where an optional package is missing."""

import importlib
import importlib.metadata
import tomllib

import pytest
from paths import ROOT

from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime.extras import install_command, needed_for


def test_a_missing_module_is_one_line_that_installs_it() -> None:
    with pytest.raises(InputError) as caught, needed_for("a picture", "report"):
        importlib.import_module("no_such_module.part")
    assert str(caught.value) == (
        'a picture needs no_such_module, which is not installed: pip install "cluscomp-jax[report]"'
    )


@pytest.mark.parametrize("module", ["cluscomp_jax.no_such_part", "pallas_kernels.no_such_part"])
def test_a_module_of_ours_that_is_missing_is_no_matter_of_extras(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=module), needed_for("a picture", "report"):
        importlib.import_module(module)


def test_another_error_of_an_import_stays_what_it_is() -> None:
    with pytest.raises(ImportError, match="no_such_name"), needed_for("a picture", "report"):
        from math import no_such_name  # noqa: F401


def test_a_command_ends_with_the_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, needed_for("a picture", "report", command=True):
        importlib.import_module("no_such_module")
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        'error: a picture needs no_such_module, which is not installed: pip install "cluscomp-jax[report]"\n'
    )


def test_what_is_not_installed_is_installed_from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert install_command("hf") == 'pip install ".[hf]" in the checkout'


def test_the_core_needs_few_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert named == {"jax", "flax", "optax", "orbax-checkpoint", "numpy"}


def test_what_the_oldest_job_installs_are_the_floors_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    stated = [*project["dependencies"], *extras["hf"], *extras["cli"], *extras["report"]]
    floors = dict(requirement.split(",")[0].split(">=") for requirement in stated if ">=" in requirement)
    lines = (ROOT / "requirements" / "floor.txt").read_text(encoding="utf-8").splitlines()
    installed = dict(line.split("==") for line in lines if "==" in line)
    assert installed.keys() == floors.keys()
    for name, floor in floors.items():
        assert (installed[name] + ".").startswith(floor + "."), name
