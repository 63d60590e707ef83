"""Whether codebases that know nothing of cluscomp_jax run with clustered parameters; tiny random models on a CPU.

For each codebase that is installed: its kernels are clustered where they are in its own pytree, and its own forward
pass runs on the result, through `with_codebooks` and on the decoded parameters. The table has the largest difference
of the two, which only the order of sums may cause, and how many products were done from codebook and index. Its last
column has those products, done from codebooks + decoded, where the model runs through qwix (`ClusterProvider`) instead.
The exit code is 1 if a codebase that is installed fails or differs by more than 1e-5.

    pip install -r requirements/codebases.txt
    python scripts/try_codebases.py                     # some four minutes
    python scripts/try_codebases.py --only maxtext --only gemma3
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import traceback
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from cluscomp_jax import cluster_tree, count_products, decompress, size_report, with_codebooks
from codebases import CODEBASES, Case, Codebase

LIMIT = 1e-5


@dataclasses.dataclass(frozen=True)
class Result:
    """What the table says of one codebase. `problem`: why it has no numbers, None where it has."""

    name: str
    version: str = ""
    kernels: int = 0
    bits: float = 0.0
    difference: float = 0.0
    served: int = 0
    decoded: int = 0
    lines: int = 0
    through_qwix: str = "-"
    problem: str | None = None
    failed: bool = False


def attempt(codebase: Codebase) -> Result:
    """Returns what came of one codebase; whatever it raises becomes a line of the table."""
    if not codebase.installed:
        return Result(codebase.name, problem=f"not installed ({codebase.install})")
    try:
        return measure(codebase)
    except Exception as error:
        traceback.print_exc()
        return Result(codebase.name, codebase.version, problem=f"{type(error).__name__}: {error}", failed=True)


def measure(codebase: Codebase) -> Result:
    """Returns the numbers of one codebase: its forward pass on codebooks, and the same on decoded parameters."""
    case = codebase.build()
    with case.context():
        clustered = cluster_tree(case.params, case.rules)
        expected = jax.jit(case.forward)(decompress(clustered), *case.inputs)
        with count_products() as counts:
            logits = jax.jit(with_codebooks(case.forward))(clustered, *case.inputs)
        difference, through_qwix = relative(logits, expected), "-"
        if case.through_qwix is not None and importlib.util.find_spec("qwix") is not None:
            logits, through_qwix = run_through_qwix(case, clustered)
            difference = max(difference, relative(logits, expected))
    size = size_report(clustered)
    return Result(
        codebase.name,
        codebase.version,
        len(size.matrices),
        size.bits_per_weight,
        difference,
        counts.served,
        counts.decoded,
        case.lines,
        through_qwix,
        failed=not difference <= LIMIT,
    )


def run_through_qwix(case: Case, clustered: Any) -> tuple[jax.Array, str]:
    """Returns (the logits of the model under ClusterProvider, "served + decoded")."""
    from cluscomp_jax.integrations.qwix import ClusterProvider

    forward = case.through_qwix(ClusterProvider(), clustered)
    with count_products() as counts:
        logits = forward(*case.inputs)
    return logits, f"{counts.served} + {counts.decoded}"


def relative(logits: jax.Array, expected: jax.Array) -> float:
    """Returns the largest difference, over the largest number expected."""
    return float(jnp.max(jnp.abs(logits - expected)) / jnp.max(jnp.abs(expected)))


def table_of(results: list[Result]) -> Table:
    table = Table(title=f"jax {jax.__version__}")
    for column in ("codebase", "version", "kernels", "bits/weight", "difference", "served", "decoded", "lines", "qwix"):
        table.add_column(column, justify="left" if column in ("codebase", "version") else "right")
    for r in results:
        if r.problem is None:
            numbers = (r.kernels, f"{r.bits:.2f}", f"{r.difference:.1e}", r.served, r.decoded, r.lines, r.through_qwix)
            table.add_row(r.name, r.version, *map(str, numbers), style="red" if r.failed else None)
        else:
            table.add_row(r.name, r.version or "-", *"-" * 7, style="red" if r.failed else "dim")
    return table


def main() -> int:
    names = [codebase.name for codebase in CODEBASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of: {', '.join(names)}")
    chosen = parser.parse_args().only or names
    results = []
    for codebase in CODEBASES:
        if codebase.name in chosen:
            print(codebase.name, file=sys.stderr, flush=True)
            results.append(attempt(codebase))
    console = Console(width=120)
    console.print(table_of(results))
    for result in results:
        if result.problem is not None:
            console.print(f"{result.name}: {result.problem}", markup=False, highlight=False)
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
