"""Compiles every kernel in every configuration that ships and prints one table; with a GPU, also checks and times them.

    pip install "cluscomp-jax[aot]"
    python -m pallas_kernels.verify                                   # sm_80, sm_86, sm_89 and sm_90
    python -m pallas_kernels.verify --arch sm_86 --only forward-out   # cases whose name contains that

Registers, spills, shared memory and instructions stand one after the other for the cards asked for. Exit code 0: all
pass; 1: a case fails; 2: wrong arguments.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.verify import judge
from pallas_kernels.verify.cases import Case, shipped


def compile_apart(case: Case, archs: Sequence[str]) -> dict[str, Any]:
    """Returns the report of a case, compiled in a process of its own; a process that dies fails every card."""
    command = [sys.executable, "-m", "pallas_kernels.verify.compile", json.dumps(dataclasses.asdict(case)), *archs]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        return {"accesses": [], "archs": {arch: {"error": last} for arch in archs}}
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.verify", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--arch", action="append", choices=judge.SHARED_KIB, help="a card; may be repeated; all")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(argv)
    archs = options.arch or list(judge.SHARED_KIB)
    cases = [case for case in shipped() if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only!r}: no case has that in its name")
    print(f"{len(cases)} cases compiled for {' '.join(archs)}, not run\n{judge.HEADER}", flush=True)
    failed = 0
    for case in cases:
        report = compile_apart(case, archs)
        wrong = judge.failures(case, report)
        failed += bool(wrong)
        print(judge.row(case, report, wrong), flush=True)
    print(f"{len(cases) - failed} pass, {failed} fail")
    if Path("/dev/nvidiactl").exists():
        from pallas_kernels.verify import measure

        for text, right in measure.table(cases):
            failed += not right
            print(text, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
