"""The `cluscomp` command. Says in one line what the core alone lacks of it."""

import sys
from collections.abc import Sequence

from cluscomp_jax import _version
from cluscomp_jax.cli.outcome import DONE, WRONG_INPUT, note
from cluscomp_jax.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of one command: 0 done, 1 failed, 2 wrong input.

    Args:
      argv: arguments after the program's name; None: those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--version"]:
        print(f"cluscomp {_version.versions().get('cluscomp-jax', 'that is not installed')}")
        return DONE
    try:
        from cluscomp_jax.cli.commands import run_command  # here, because it needs the extra cli
    except InputError as error:
        note(f"error: {error}")
        return WRONG_INPUT
    return run_command(argv)
