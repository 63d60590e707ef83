"""Makes a virtual environment with this project's wheel in it: `make_venv.py FOLDER --group test --extra parity`.

The standard library alone, so that any Python >= 3.11 can start it. Knows nothing of what is then run there.
The folder is made afresh. The wheel is built and installed, never the checkout, so that what runs there is what
ships. Versions are held to requirements/constraints-X.Y.txt where that file exists for the Python in use; other
Pythons take the newest that pyproject.toml allows.

uv installs, with pip's own index settings, where it can be had: seconds instead of a minute. Elsewhere pip does it.
"""

import argparse
import os
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
}
"""The settings of pip that say where packages come from, and the environment variables by which uv reads them."""


def group_requirements(groups: Mapping[str, Sequence[Any]], name: str) -> list[str]:
    """Returns the requirements of a dependency group (PEP 735), its included groups resolved."""
    requirements = []
    for entry in groups[name]:
        requirements += [entry] if isinstance(entry, str) else group_requirements(groups, entry["include-group"])
    return requirements


def uv_environment(python: Path) -> dict[str, str]:
    """Returns the environment in which uv looks for packages where this machine's pip does."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    places: dict[str, list[str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        name = key.removeprefix(":env:.").rpartition(".")[2]
        if name in UV_NAMES:
            places.setdefault(UV_NAMES[name], []).extend(value.strip("'\"").replace("\\n", " ").split())
    found = {
        name: (",".join if name == "UV_FIND_LINKS" else " ".join)(dict.fromkeys(values))
        for name, values in places.items()
    }
    # pip takes the best version of all its indexes, uv by default only looks into the first that has the package.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **found, **os.environ}


class Installer:
    """Builds and installs into one virtual environment, by uv where it works, else by pip."""

    def __init__(self, folder: Path):
        self.python = folder / "bin" / "python"
        self._constraints = self._constraints_file()
        bootstrap = [self.python, "-m", "pip", "install", "--quiet", "uv"]
        self._uv = subprocess.run(bootstrap, check=False).returncode == 0
        self._environment = uv_environment(self.python)

    def build_wheel(self, folder: Path) -> Path:
        """Returns the project's wheel, built into `folder`."""
        self._try_uv(
            ["build", "--quiet", "--wheel", "--python", self.python, "--out-dir", folder, ROOT],
            otherwise=["wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT],
        )
        (wheel,) = folder.glob("*.whl")
        return wheel

    def install(self, requirements: Sequence[str], *, flags: Sequence[str] = ()) -> None:
        """Installs the requirements, held to the constraints."""
        arguments = [*flags, *self._constraints, *requirements]
        self._try_uv(
            ["pip", "install", "--quiet", "--python", self.python, *arguments],
            otherwise=["install", "--quiet", "--no-compile", *arguments],
        )

    def _constraints_file(self) -> list[str]:
        query = "import sys; print('{}.{}'.format(*sys.version_info))"
        version = subprocess.run([self.python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
        file = ROOT / "requirements" / f"constraints-{version}.txt"
        return ["--constraint", str(file)] if file.exists() else []

    def _try_uv(self, arguments: Sequence[Any], *, otherwise: Sequence[Any]) -> None:
        if self._uv:
            command = [self.python, "-m", "uv", *arguments]
            if subprocess.run(command, env=self._environment, check=False).returncode == 0:
                return
            print("uv could not do it; once more by pip", file=sys.stderr, flush=True)
        subprocess.run([self.python, "-m", "pip", *otherwise], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the environment goes; an older one there is removed")
    parser.add_argument("--group", action="append", default=[], help="a dependency group of pyproject.toml")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml")
    parser.add_argument(
        "--bare-group", action="append", default=[], help="a group to install without what its packages depend on"
    )
    options = parser.parse_args()
    started = time.monotonic()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = [r for name in options.group for r in group_requirements(project["dependency-groups"], name)]
    groups = project["dependency-groups"]
    bare = [requirement for name in options.bare_group for requirement in group_requirements(groups, name)]

    if options.folder.exists() and not (options.folder / "pyvenv.cfg").exists():
        parser.error(f"{options.folder} exists and is no virtual environment; it is left as it is")
    try:
        venv.create(options.folder, clear=True, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:  # Debian and Ubuntu ship ensurepip apart from python3
        sys.exit(f"{sys.executable} cannot install pip; on Debian or Ubuntu: apt install python3-venv")
    installer = Installer(options.folder.resolve())
    wheel = installer.build_wheel(options.folder.resolve() / "wheel")
    installer.install([f"{wheel}[{','.join(options.extra)}]" if options.extra else str(wheel), *requirements])
    if bare:
        installer.install(bare, flags=["--no-deps"])
    print(f"{options.folder}: {wheel.name} installed in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
