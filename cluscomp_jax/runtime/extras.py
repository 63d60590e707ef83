"""How what is optional is installed: by the requirements themselves, whether or not this package is on an index."""

import importlib.metadata
import re

_EXTRA = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")


def install_command(extra: str) -> str:
    """Returns the command that installs what an extra of this package needs.

    Args:
      extra: its name in pyproject.toml.
    """
    try:
        requirements = importlib.metadata.requires("cluscomp-jax") or ()
    except importlib.metadata.PackageNotFoundError:
        return f"pip install what pyproject.toml lists as {extra}"
    needed = []
    for requirement in requirements:
        specifier, _, marker = requirement.partition(";")
        found = _EXTRA.search(marker)
        if found and found[1] == extra:
            needed.append(re.sub(r"\s", "", specifier))
    return "pip install " + " ".join(f"'{requirement}'" for requirement in needed)
