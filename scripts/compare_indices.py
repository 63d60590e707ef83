"""The squared error of plain and trellis indices on synthetic weights of the shape of Llama-2-7B's gate_proj.

    python scripts/compare_indices.py

The weights are of Student's t with 8 degrees of freedom, each input channel of a log-normal scale (sigma 0.3). Nothing
is calibrated: every vector takes its nearest code, every channel the path of least error. Takes about three
minutes on two cores; `--only` names settings as "g,n" or "g,n,step_bits".
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.matrix import cluster_matrix
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.core.coding import stored_bits

SETTINGS = ("4,256", "2,4096,4", "2,2048,4", "1,1024,2", "8,65500")


def synthetic(shape: tuple[int, int]) -> np.ndarray:
    """Returns weights float32 [d_in, d_out]."""
    rng = np.random.default_rng(0)
    scales = np.exp(0.3 * rng.standard_normal((shape[0], 1), dtype=np.float32))
    return (rng.standard_t(8, shape) * scales).astype(np.float32)


def rule_of(text: str) -> CompressionRule:
    """Returns the rule of "g,n" or "g,n,step_bits"."""
    g, num_codes, *step = map(int, text.split(","))
    return CompressionRule(group_size=g, num_codes=num_codes, step_bits=step[0] if step else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 11008), metavar=("D_IN", "D_OUT"))
    parser.add_argument("--iterations", type=int, default=20, help="of k-means, and rounds of a trellis (default: 20)")
    parser.add_argument("--only", nargs="+", default=SETTINGS, metavar="SETTING", help="default: all")
    options = parser.parse_args()
    shape = (options.shape[0], options.shape[1])
    weights = synthetic(shape)
    settings = ClusterConfig(error_feedback=False, weighted=False, iterations=options.iterations)
    print("setting         bits/weight    error  seconds")
    for text in options.only:
        rule, began = rule_of(text), time.monotonic()
        bits = stored_bits(rule.form(shape), rule.coding) / math.prod(shape)
        _, stats = cluster_matrix(jnp.asarray(weights), rule, settings, key=jax.random.key(0))
        error, seconds = stats.relative_error, time.monotonic() - began
        print(f"{text:15} {bits:11.3f} {error:8.4f} {seconds:8.0f}", flush=True)


if __name__ == "__main__":
    main()
