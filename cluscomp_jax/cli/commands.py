"""The commands: parses, calls, prints. Imports the heavy parts only after the arguments were parsed."""

import importlib
from collections.abc import Sequence

from cluscomp_jax.cli import arguments as args
from cluscomp_jax.cli.outcome import DONE, WRONG_INPUT, Result, run
from cluscomp_jax.runtime.compiled_programs import keep_compiled_programs
from cluscomp_jax.runtime.extras import needed_for
from cluscomp_jax.runtime.host_memory import keep_freed_memory, schedule_for_memory
from cluscomp_jax.runtime.platform import skip_absent_gpu

with needed_for("the command line", "cli"):
    import tyro
    from tyro.conf import DisallowNone

_MODULES: dict[type[args.Common], str] = {
    args.CompressArguments: "compress",
    args.FinetuneArguments: "finetune",
    args.EvaluateArguments: "evaluate",
    args.GenerateArguments: "generate",
    args.InspectArguments: "inspect",
    args.ExportArguments: "export",
    args.ImportArguments: "import_model",
    args.ReportArguments: "report",
    args.CompareArguments: "compare",
    args.DoctorArguments: "doctor",
    args.PlanArguments: "plan",
    args.DemoArguments: "demo",
}


def run_command(argv: Sequence[str]) -> int:
    """Returns the exit code of one command: 0 done, 1 failed, 2 wrong input.

    Args:
      argv: arguments after the program's name.
    """
    try:
        parsed: args.Command = tyro.cli(
            args.AnyCommand,  # type: ignore[arg-type]
            prog="cluscomp",
            description="Compress language models by clustering, and run them.",
            args=argv,
            config=(DisallowNone,),  # None means that an option was left out; it cannot be given
        )
    except SystemExit as end:  # tyro has printed help or the usage error
        return DONE if end.code in (None, 0) else WRONG_INPUT

    def command() -> Result:
        skip_absent_gpu()
        if getattr(parsed, "coordinator", None) is None:
            keep_compiled_programs()
        keep_freed_memory()
        schedule_for_memory()
        module = importlib.import_module(f"cluscomp_jax.cli.{_MODULES[type(parsed)]}")
        return module.run(parsed)

    resumable = isinstance(parsed, args.CompressArguments | args.FinetuneArguments | args.DemoArguments)
    return run(command, json=parsed.json, debug=parsed.debug, resumable=resumable)
