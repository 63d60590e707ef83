"""Times error feedback for one block of SmolLM2-135M next to the clustering of that block, warm, in one process.

    cluscomp demo --fetch
    python scripts/bench_feedback.py --num-codes 1024 --repeats 5

Clustering is `fit_codebook` of the seven matrices. Error feedback is the root of the Hessian E[x x^T] of the four
inputs and the choice of all codes, with the default number of refine rounds. Each round times both, so that other work
of the machine affects both.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cluscomp_jax
from cluscomp_jax import data, kmeans
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.coders import to_vectors
from cluscomp_jax.clustering.error_feedback import HessianFactor, assign_with_error_feedback, factor_hessian
from cluscomp_jax.clustering.hessian import collect_hessians
from cluscomp_jax.clustering.matrix import matrix_key
from cluscomp_jax.clustering.refine import refine
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.core import trees
from cluscomp_jax.models.model import run_block, run_embed
from cluscomp_jax.models.streams import Batch
from cluscomp_jax.text.text import load_tokens


def hessians_of(opened: Any, block: int, samples: int) -> dict[str, jax.Array]:
    """Returns {input group: E[x x^T] float32 [d_in, d_in]} of a block on real text."""
    model, source = opened.model, opened.source
    tokens = load_tokens(data.path("wiki_train"), opened.load_tokenizer())[: samples * 512].reshape(samples, 512)
    outer = jax.tree.map(jnp.asarray, source.load_outer())
    stream = [run_embed(outer, row[None].astype(np.int32), model=model, dtype=jnp.dtype("float32")) for row in tokens]
    for i in range(block):
        before = jax.tree.map(jnp.asarray, source.load_block(i))
        stream = [run_block(before, x, model=model, layer_type=model.layer_type(i)) for x in stream]
    dense = jax.tree.map(jnp.asarray, source.load_block(block))
    layer_type = model.layer_type(block)
    return {
        group: collect_hessians(model, layer_type, [group], dense, map(Batch, stream))[group].hessian
        for group in model.input_groups
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--g", type=int, default=4)
    parser.add_argument("--num-codes", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--refine-rounds", type=int, default=ClusterConfig().refine_rounds, help="refine rounds")
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    opened = cluscomp_jax.open_model(find_model())
    hessians = hessians_of(opened, options.block, samples=4)
    flat = trees.flatten(jax.tree.map(jnp.asarray, opened.source.load_block(options.block)))
    kernels = {path: flat[path] for paths in opened.model.input_groups.values() for path in paths}

    def cluster() -> dict[str, jax.Array]:
        codes = {}
        for path, kernel in kernels.items():
            vectors = to_vectors(kernel, g=options.g, axis="out")
            key = matrix_key(0, path)
            codes[path], _, _ = kmeans.fit_codebook(
                vectors, num_codes=options.num_codes, key=key, iterations=options.iterations
            )
        return jax.block_until_ready(codes)

    def feed_back(codes: dict[str, jax.Array]) -> None:
        for group, paths in opened.model.input_groups.items():
            factor: HessianFactor = factor_hessian(hessians[group])
            for path in paths:
                weight, key = kernels[path], matrix_key(0, path)
                search = NearestCodes().for_codebook(codes[path], key)
                index = assign_with_error_feedback(weight, codes[path], factor, search)
                refined = refine(weight, codes[path], index, factor, search, rounds=options.refine_rounds, key=key)
                jax.block_until_ready(refined)

    codes = cluster()
    feed_back(codes)
    times: list[tuple[float, float]] = []
    for _ in range(options.repeats):
        began = time.monotonic()
        cluster()
        between = time.monotonic()
        feed_back(codes)
        times.append((between - began, time.monotonic() - between))
        print(f"clustering {times[-1][0]:.2f} s, error feedback {times[-1][1]:.2f} s", flush=True)
    ratio = statistics.median(factor / clustering for clustering, factor in times)
    print(f"block {options.block}, g={options.g}, n={options.num_codes}: error feedback takes {ratio:.2f} x clustering")


if __name__ == "__main__":
    main()
