"""`cluscomp completion`: the shell script that completes this command's options. tyro writes it."""

import contextlib
import io

import tyro

from cluscomp_jax.cli.arguments import AnyCommand, CompletionArguments
from cluscomp_jax.cli.outcome import Result


def run(arguments: CompletionArguments) -> Result:
    """Returns the script."""
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):  # tyro ends the process once it printed
        tyro.cli(AnyCommand, prog="cluscomp", args=["--tyro-print-completion", arguments.shell])  # type: ignore[arg-type]
    return Result(script.getvalue(), {"shell": arguments.shell, "script": script.getvalue()})
