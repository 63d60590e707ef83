"""What is optional: the imports of an extra, and one line that installs it where it is missing.

Knows no extra by name; pyproject.toml lists them.
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluscomp_jax.errors import InputError

_OURS = ("cluscomp_jax", "pallas_kernels")


def install_command(extra: str) -> str:
    """Returns the command that installs what an extra of this package needs.

    pip takes the installed package itself as it is, whether or not an index has it.

    Args:
      extra: its name in pyproject.toml.
    """
    try:
        importlib.metadata.distribution("cluscomp-jax")
    except importlib.metadata.PackageNotFoundError:
        return f'pip install ".[{extra}]" in the checkout'
    return f'pip install "cluscomp-jax[{extra}]"'


@contextmanager
def needed_for(purpose: str, extra: str, *, command: bool = False) -> Iterator[None]:
    """Imports inside the block may be missing: one line then says what needs them, and how they are installed.

    Args:
      purpose: what needs the imports, the subject of a sentence.
      extra: of pyproject.toml, which has them.
      command: whether the importing module runs as a command, which ends with the line and exit code 2.

    Raises:
      InputError: a module of another package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        if module in _OURS:
            raise
        line = f"{purpose} needs {module}, which is not installed: {install_command(extra)}"
        if command:
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)
        raise InputError(line) from None
