"""Plans of three Llamas at 4 and 2 bits for every shipped card; and how far they are from those of another environment.

Nothing runs on a card. One plan takes three to five minutes of CPU; those that OUT already has are not made again.

    pip install ".[aot]"
    python scripts/compare_plans.py --out OUT                      # one JSON file for each model, bits and card
    python scripts/compare_plans.py --out OUT --against OTHER      # OTHER: the same of another release of JAX
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from cluscomp_jax.plan.target import shipped_targets
from cluscomp_jax.plan.whole import GIB
from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.json_files import read_object

MODELS = ("llama-2-7b", "llama-2-70b", "llama-3.1-405b")
BITS = (4, 2)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def make(name: str, model: str, bits: int, target: str, out: Path) -> None:
    """Writes the plan to OUT/NAME.json, or ends the program with what `cluscomp plan` said."""
    config = CONFIGS / f"llama_{bits}bit.toml"
    command = [sys.executable, "-m", "cluscomp_jax", "plan", model, "--target", target, "--config", str(config)]
    done = subprocess.run(
        [*command, "--context", "4096", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr}") from None
    atomic.write_text(out / f"{name}.json", json.dumps(found), aside=out / f"{name}.part")


def peaks(path: Path) -> dict[str, float]:
    """Returns {stage: GiB at its peak} of a plan."""
    return {stage: memory["peak_bytes"] / GIB for stage, memory in read_object(path)["stages"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--against", type=Path, help="folder of plans to compare with")
    parser.add_argument("--targets", nargs="*", choices=shipped_targets(), default=shipped_targets())
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--bits", nargs="*", type=int, choices=BITS, default=BITS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for target, bits, model in itertools.product(arguments.targets, arguments.bits, arguments.models):
        name = f"{model}-{bits}bit-{target}"
        found, other = arguments.out / f"{name}.json", arguments.against and arguments.against / f"{name}.json"
        if not found.exists():
            make(name, model, bits, target, arguments.out)
        here = peaks(found)
        if other is None or not other.exists():
            print(name, *(f"{stage} {peak:.2f}" for stage, peak in here.items()), sep="  ", flush=True)
            continue
        there = peaks(other)
        if here.keys() != there.keys():
            raise SystemExit(f"{name}: stages {sorted(here)} here and {sorted(there)} in {arguments.against}")
        cells = (f"{stage} {peak:.2f} ({peak / there[stage] - 1:+.1%})" for stage, peak in here.items())
        print(name, *cells, sep="  ", flush=True)


if __name__ == "__main__":
    main()
