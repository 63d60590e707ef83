"""Compiles the programs of `fit_codebook` for a card that need not be here, and prints the device memory of each.

`cluscomp plan` does this for all programs of a run; here m, g and n are free. Numbers are XLA's own buffer assignment,
ahead of time; nothing runs. "also held" is what else the fit holds on the device meanwhile.

    pip install ".[aot]"
    python scripts/aot_kmeans.py                                  # Llama-2-70B's gate_proj on an RTX A6000
    python scripts/aot_kmeans.py --vectors 11272192 --g 4 --codes 65500 --target FILE.txtpb
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # still registers the CUDA compiler, and looks for no card

import jax

from cluscomp_jax.plan import compiling_for, find_target, placement
from cluscomp_jax.plan.kmeans_programs import fit_programs
from cluscomp_jax.plan.program import compile_program
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.whole import GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vectors", type=int, default=8192 * 28672 // 4, help="m")
    parser.add_argument("--g", type=int, default=4, help="weights per vector")
    parser.add_argument("--codes", type=int, default=65500, help="n")
    parser.add_argument("--weighted", action="store_true", help="vectors have weights")
    parser.add_argument("--target", default="a6000", help="card, or a .txtpb file that describes one")
    options = parser.parse_args()
    target = find_target(options.target)
    sizes = {"m": options.vectors, "g": options.g, "n": options.codes}
    print(f"jax {jax.__version__}, {target.name}, ahead of time: {sizes}")
    print("| program | arguments GiB | results GiB | temporaries GiB | also held GiB | all GiB |\n" + "|---" * 6 + "|")
    largest = 0
    place = AbstractDevice(placement(target))
    with compiling_for(target):
        for program in fit_programs(place, **sizes, weighted=options.weighted, iterations=20, calls=1):
            memory = compile_program(program)
            parts = [memory.argument_bytes, memory.output_bytes, memory.temp_bytes, memory.held_bytes]
            largest = max(largest, memory.peak_bytes)
            cells = " | ".join(f"{part / GIB:.3f}" for part in (*parts, memory.peak_bytes))
            print(f"| {memory.name} | {cells} |", flush=True)
    print(f"largest: {largest / GIB:.3f} GiB")


if __name__ == "__main__":
    main()
