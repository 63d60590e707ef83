"""Compiles every GPU kernel in every shipped configuration and prints a table; with a GPU, also checks and times them.

    pip install ".[aot]"                                              # in a checkout
    python -m scripts.verify_kernels                                   # sm_80, sm_86, sm_89 and sm_90
    python -m scripts.verify_kernels --arch sm_86 --only forward-out   # cases whose name contains that
    python -m scripts.verify_kernels --tune a6000.json                 # see pallas_kernels.codebook_matmul.table

Registers, spills, shared memory and instructions are given for each of the cards asked for. Exit code 0: all
pass; 1: a case fails; 2: wrong arguments.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.codebook_matmul.table import write_table

from . import judge
from .cases import Case, shipped
from .searches import SearchCase, searches
from .tune import tune


def compile_apart(cases: Sequence[Case | SearchCase], archs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the report of each case, compiled in another process; one that kills it fails, the next get a new one."""
    waiting = list(cases)
    while waiting:
        wanted = "\n".join(json.dumps(dataclasses.asdict(case)) for case in waiting)
        with (
            tempfile.TemporaryFile("w+") as asked,
            tempfile.TemporaryFile("w+") as said,
            tempfile.TemporaryDirectory() as dump,
        ):
            asked.write(wanted)
            asked.seek(0)
            command = [sys.executable, "-m", f"{__package__}.compile", dump, *archs]
            with subprocess.Popen(
                command, stdin=asked, stdout=subprocess.PIPE, stderr=said, text=True, env=_environment(dump)
            ) as process:
                for line in process.stdout or ():
                    waiting.pop(0)
                    yield json.loads(line)
            if waiting:
                said.seek(0)
                last = (said.read().strip() or f"the compiler ended with {process.returncode}").splitlines()[-1]
                waiting.pop(0)
                yield {"accesses": [], "archs": {arch: {"error": last} for arch in archs}}


def _environment(dump: str) -> dict[str, str]:
    """Returns that of the compiling process: no card is looked for, and XLA leaves each module's PTX in `dump`."""
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=false --xla_dump_emitter_re=ptx"
    root = Path(__file__).resolve().parents[len((__package__ or "").split("."))]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "PYTHONPATH": paths,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify_kernels", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--arch", action="append", choices=judge.SHARED_KIB, help="a card; may be repeated; all")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--tune", type=Path, help="with a GPU: try tiles, and write the fastest to this new file")
    options = parser.parse_args(argv)
    if options.tune and (options.tune.exists() or not Path("/dev/nvidiactl").exists()):
        parser.error(
            f"--tune {options.tune}: " + ("it exists" if options.tune.exists() else "there is no GPU to try on")
        )
    archs = options.arch or list(judge.SHARED_KIB)
    everything: list[Case | SearchCase] = [*shipped(), *searches()]
    cases = [case for case in everything if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only!r}: no case has that in its name")
    print(f"{len(cases)} cases compiled for {' '.join(archs)}, not run\n{judge.HEADER}", flush=True)
    failed = 0
    for case, report in zip(cases, compile_apart(cases, archs), strict=True):
        wrong = judge.failures(case, report)
        failed += bool(wrong)
        print(judge.row(case, report, wrong), flush=True)
    print(f"{len(cases) - failed} pass, {failed} fail")
    if Path("/dev/nvidiactl").exists():
        from . import measure

        products = [case for case in cases if isinstance(case, Case)]
        if options.tune:
            write_table(options.tune, tune(products, measure.time_tile))
        for text, right in measure.table(products):
            failed += not right
            print(text, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
