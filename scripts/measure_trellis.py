"""The squared error of trellises of every window and rate, on four matrices of SmolLM2-135M; weights alone.

    cluscomp demo --fetch
    python scripts/measure_trellis.py                       # the table of cluscomp_jax/trellis/distortion.py
    python scripts/measure_trellis.py --group 2 --bits 4    # one row of it

Takes one to two hours on two cores. A bit budget is spent by these figures.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.core import trees
from cluscomp_jax.io.open import open_model
from cluscomp_jax.trellis.fit import best_codes, fit_codebook
from cluscomp_jax.trellis.viterbi import Trellis

MATRICES = (
    (10, "self_attn/q_proj/kernel"),
    (10, "mlp/down_proj/kernel"),
    (20, "mlp/gate_proj/kernel"),
    (20, "self_attn/o_proj/kernel"),
)
WINDOWS = {1: range(6, 11), 2: range(5, 13)}
BITS = {1: range(1, 6), 2: range(1, 8)}
JUDGED, ROUNDS = 288, 20


def relative_error(matrix: np.ndarray, trellis: Trellis, g: int) -> float:
    """Returns the error of every few lines of a matrix [d_in, d_out], the codebook fitted to all of them."""
    lines = jnp.asarray(matrix).reshape(len(matrix), -1, g)
    codebook = fit_codebook(lines, trellis, key=jax.random.key(0), rounds=ROUNDS)
    some = lines[:: max(1, len(lines) // JUDGED)]
    codes = best_codes(some, codebook, trellis=trellis)
    return float(jnp.sum(jnp.square(some - codebook[codes])) / jnp.sum(jnp.square(some)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model of SmolLM2's shapes; default: the demo's")
    parser.add_argument("--group", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--bits", type=int, nargs="+", help="bits per code; default: all")
    options = parser.parse_args()
    opened = open_model(options.model or find_model())
    blocks = {i: trees.flatten(opened.source.load_block(i)) for i, _ in MATRICES}
    matrices = [np.asarray(blocks[i][path], np.float32) for i, path in MATRICES]
    for g in options.group:
        for bits in options.bits or BITS[g]:
            first = max(WINDOWS[g].start, bits + (2 if g == 1 else 1))
            errors = []
            for window in range(first, WINDOWS[g].stop):
                each = [relative_error(matrix, Trellis(window, bits), g) for matrix in matrices]
                errors.append(f"{np.mean(each):.5f}")
            print(f"({g}, {bits}, {first}): ({', '.join(errors)}),", flush=True)


if __name__ == "__main__":
    main()
