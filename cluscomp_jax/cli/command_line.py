"""The command line of given arguments, for records. Knows no command by name."""

import dataclasses
import shlex

from cluscomp_jax.cli.arguments import Command

_NOT_RECORDED = ("json", "debug")


def command_line(arguments: Command) -> str:
    """Returns "cluscomp COMMAND MODEL --option value …" with every option that is not at its default."""
    words = ["cluscomp", type(arguments).__name__.removesuffix("Arguments").lower()]
    options: list[str] = []
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if field.name in _NOT_RECORDED or value == field.default:
            continue
        if field.name in ("model", "models"):
            words += [value] if isinstance(value, str) else list(value)
            continue
        flag = "--for" if field.name == "export" else f"--{field.name.replace('_', '-')}"
        values = [] if value is True else [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        options += [flag, *values]
    return shlex.join(words + options)
