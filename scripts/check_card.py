"""Measures and checks this project on the NVIDIA GPU of this machine in eight minutes: `check_card.py --out card.json`.

    python scripts/check_card.py --out card.json                    # all steps, the most valuable facts first
    python scripts/check_card.py --out card.json --only values      # one step; --only may be repeated
    python scripts/check_card.py --out card.json --seconds 900      # longer limits
    python scripts/check_card.py --out dry.json --dry               # the same on a CPU, with tiny shapes

Needs a checkout, JAX with CUDA, and jax's usual neighbours; no network, no installed wheel. The result file is written
again after every fact, so a run that is cut off leaves what it found. Exit codes: 0 all steps done and all values
right; 1 otherwise; 2 wrong input.
"""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]
    if sys.argv[1:2] == ["step"]:  # the process of one step, which command.py starts
        from check_card.step import main
    else:
        from check_card.command import main
    sys.exit(main(sys.argv[2:] if sys.argv[1:2] == ["step"] else sys.argv[1:]))
