"""How many packages this project brings, and which packages of others it can be installed next to.

    python scripts/resolve_next_to.py                                      # Python of this interpreter, the core
    python scripts/resolve_next_to.py --python-version 3.12 --extra hf     # another Python, with an extra
    python scripts/resolve_next_to.py "maxtext[cuda12]"                    # other packages than those listed below

Nothing is installed. Needs uv (`pip install uv`) and a package index, which is that of pip. Each package is held to
its newest version that the index has for this Python, since a resolver would else go back to a version of years ago.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from make_venv import uv_environment

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("google-tunix", "qwix", "gemma", "keras-hub", "maxtext", "levanter", "easydel")
OURS = "cluscomp-jax"
_NAME = r"[A-Za-z0-9][\w.-]*(?:\[[\w,.-]+\])?"
_RANGE = r"[<>=!~]=?[\w.*+!-]+"
_SUBJECT = rf"{_NAME}(?:{_RANGE}(?:,{_RANGE})*)?"
_DEPENDS = re.compile(rf"({_SUBJECT}) depends? on ({_NAME})((?:{_RANGE})(?:,{_RANGE})*)")
_PIN = re.compile(rf"^({_NAME})==([^\s;]+)")


class Resolution(NamedTuple):
    """What a resolver answered: {name: version} of the packages, or why there are none."""

    versions: Mapping[str, str]
    error: str = ""


def pinned(listing: str) -> dict[str, str]:
    """Returns {name: version} of a resolver's listing; a package from a folder has the version ""."""
    found = {}
    for line in listing.splitlines():
        if pin := _PIN.match(line):
            found[canonical(pin[1])] = pin[2]
        elif " @ " in line and not line.startswith("#"):
            found[canonical(line.partition(" @ ")[0])] = ""
    return found


def canonical(name: str) -> str:
    """Returns the name by which a package is found, without its extras."""
    return re.sub(r"[-_.]+", "-", name.partition("[")[0].strip()).lower()


def clash(message: str) -> str:
    """Returns one line for uv's explanation of why there is no solution: two requirements that exclude each other.

    Where it names no such pair, the line is the explanation's first sentence.
    """
    stated: dict[str, dict[str, str]] = {}
    for line in message.splitlines():
        said = line.partition("we can conclude")[0]  # what follows repeats what was said
        for subject, name, wanted in _DEPENDS.findall(said):
            stated.setdefault(canonical(name), {})[subject] = wanted
    pairs = [(name, sides) for name, sides in stated.items() if len(set(sides.values())) > 1]
    ours = [(name, sides) for name, sides in pairs if any(canonical_subject(side) == OURS for side in sides)]
    for name, sides in ours or pairs:
        return f"{name}: " + ", ".join(f"{subject} needs {wanted}" for subject, wanted in sides.items())
    cause = " ".join(message.partition("cause:")[2].split()) or " ".join(message.split())
    return re.split(r"\. (?=[A-Z])|, we can conclude", cause, maxsplit=1)[0][:300]


def canonical_subject(subject: str) -> str:
    """Returns the name of "name==1.2" or "name>=1"."""
    return canonical(re.split(r"[<>=!~]", subject, maxsplit=1)[0])


def resolve(
    requirements: Sequence[str], python_version: str, uv: Sequence[str], environment: Mapping[str, str]
) -> Resolution:
    """Returns what uv resolves the requirements to."""
    command = [
        *uv,
        "pip",
        "compile",
        "--quiet",
        "--python-version",
        python_version,
        "--no-header",
        "--no-annotate",
        "-",
    ]
    done = subprocess.run(
        command, input="\n".join(requirements), env=environment, capture_output=True, text=True, check=False
    )
    return Resolution({}, done.stderr) if done.returncode else Resolution(pinned(done.stdout))


def next_to(name: str, alone: Resolution, together: Resolution) -> str:
    """Returns the line of a package: how many packages resolve, or what clashes."""
    if alone.error:
        return f"{name}: does not resolve by itself; {clash(alone.error)}"
    version = alone.versions[canonical(name)]
    if together.error:
        return f"{name} {version}: does not resolve; {clash(together.error)}"
    neighbours = ("jax", "flax", "transformers")
    found = ", ".join(f"{other} {together.versions[other]}" for other in neighbours if other in together.versions)
    return f"{name} {version}: {len(together.versions)} packages ({len(alone.versions)} without this project; {found})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help=f"names on the index; by default {', '.join(PACKAGES)}")
    parser.add_argument("--extra", action="append", default=[], help="an extra of this project")
    parser.add_argument("--python-version", default=".".join(platform.python_version_tuple()[:2]), help="such as 3.12")
    options = parser.parse_args()
    found = shutil.which("uv")
    uv = [found] if found else [sys.executable, "-m", "uv"]
    if subprocess.run([*uv, "--version"], capture_output=True, check=False).returncode:
        sys.exit("uv is not installed: pip install uv")
    environment = {**os.environ, **uv_environment(Path(sys.executable))}
    extras = f"[{','.join(options.extra)}]" if options.extra else ""
    ours = f"{OURS}{extras} @ {ROOT.as_uri()}"

    own = resolve([ours], options.python_version, uv, environment)
    if own.error:
        sys.exit(f"this project does not resolve: {clash(own.error)}")
    print(f"pip install .{extras} under Python {options.python_version}: {len(own.versions)} packages", flush=True)
    for name in options.packages or PACKAGES:
        alone = resolve([name], options.python_version, uv, environment)
        together = alone
        if not alone.error:
            held = f"{name}=={alone.versions[canonical(name)]}"
            together = resolve([held, ours], options.python_version, uv, environment)
        print(next_to(name, alone, together), flush=True)


if __name__ == "__main__":
    main()
