"""What is installed is what is tested, and it holds what a user needs."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from paths import ROOT

import cluscomp_jax
import pallas_kernels

DISTRIBUTION = importlib.metadata.distribution("cluscomp-jax")
ORIGIN = json.loads(DISTRIBUTION.read_text("direct_url.json") or "{}")
EDITABLE = ORIGIN.get("dir_info", {}).get("editable", False)
CHECKOUT = ROOT

needs_wheel = pytest.mark.skipif(EDITABLE, reason="an editable install; `make test` installs the wheel")


def installed_files() -> set[str]:
    return {str(file) for file in DISTRIBUTION.files or ()}


def test_the_install_is_the_kind_that_was_asked_for() -> None:
    assert not (EDITABLE and os.environ.get("CLUSCOMP_TEST_INSTALL") == "wheel")


@needs_wheel
@pytest.mark.parametrize("package", [cluscomp_jax, pallas_kernels], ids=lambda package: package.__name__)
def test_the_tested_packages_are_the_installed_ones(package: object) -> None:
    file = Path(str(package.__file__)).resolve()  # type: ignore[attr-defined]
    assert file.is_relative_to(Path(str(DISTRIBUTION.locate_file(""))).resolve())
    assert CHECKOUT not in file.parents or "site-packages" in file.parts


@needs_wheel
def test_the_wheel_holds_every_source_file_and_nothing_else_of_the_checkout() -> None:
    installed = installed_files()
    for package in ("cluscomp_jax", "pallas_kernels"):
        sources = {str(file.relative_to(CHECKOUT)) for file in (CHECKOUT / package).rglob("*.py")}
        assert sources <= installed
    tops = {name.split("/")[0] for name in installed if not name.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cluscomp_jax", "pallas_kernels"}


@needs_wheel
@pytest.mark.parametrize(
    "file",
    [
        "cluscomp_jax/py.typed",
        "pallas_kernels/py.typed",
        "cluscomp_jax/reporting/html/page.html.j2",
        "cluscomp_jax/data/LICENSE.txt",
        "cluscomp_jax/data/wiki_attribution.json",
        "cluscomp_jax/data/wiki_train.txt.gz",
        "cluscomp_jax/data/wiki_test.txt.gz",
        "cluscomp_jax/data/calibration_starts.txt",
    ],
)
def test_the_wheel_holds(file: str) -> None:
    assert file in installed_files()


@needs_wheel
def test_the_licences_are_declared() -> None:
    metadata = DISTRIBUTION.metadata
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-SA-3.0"
    assert metadata.get_all("License-File") == ["LICENSE", "cluscomp_jax/data/LICENSE.txt"]


def test_the_command_is_installed() -> None:
    (command,) = (entry for entry in DISTRIBUTION.entry_points if entry.group == "console_scripts")
    assert command.name == "cluscomp"
    assert callable(command.load())


def test_pytorch_is_no_dependency() -> None:
    required = [requirement for requirement in DISTRIBUTION.requires or () if "extra ==" not in requirement]
    assert required
    assert not [requirement for requirement in required if requirement.startswith("torch")]
