"""Times `fit_codebook` next to faiss-cpu on weight-like vectors of true Llama shapes, and compares their errors.

Both cluster the same vectors in one process with the same threads, in turn. faiss trains as its users do for the
least error: `Clustering` over `IndexFlatL2`, 20 iterations, every vector. Our error is that of the index we return;
faiss's is that of an exact search through its codes. Compile time is the first run less the median of the others.
Prints a table; asserts nothing.

    pip install ".[cli,bench]"
    python scripts/bench_kmeans.py                        # all shapes; faiss alone needs about an hour on two cores
    python scripts/bench_kmeans.py --shape 1m-g4 --iterations 5 10 20 --rounds 3
    python scripts/bench_kmeans.py --faiss-iterations 2   # faiss's time from 2 iterations, its error not measured
"""

import argparse
import dataclasses
import importlib.metadata
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import faiss
import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.clustering.coders import to_vectors
from cluscomp_jax.core import trees
from cluscomp_jax.io.open import open_model
from cluscomp_jax.kmeans import KMeansStats, fit_codebook
from cluscomp_jax.runtime.host_memory import keep_freed_memory

FAISS_ITERATIONS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """m vectors of g weights and num_codes codes; from a matrix of SmolLM2-135M if `matrix` names one."""

    vectors: int
    g: int
    num_codes: int
    matrix: str = ""


SHAPES = {
    "7b-gate-g4": Shape(11_272_192, 4, 65_500),
    "1m-g4": Shape(1_048_576, 4, 65_536),
    "7b-g6": Shape(7_514_794, 6, 65_500),
    "7b-g8": Shape(5_636_096, 8, 32_000),
    "7b-g9": Shape(5_009_863, 9, 50_000),
    "7b-g16": Shape(2_818_048, 16, 65_500),
    "smollm2-gate-1024": Shape(221_184, 4, 1024, "model/layers/0/mlp/gate_proj/kernel"),
    "smollm2-gate-4096": Shape(221_184, 4, 4096, "model/layers/0/mlp/gate_proj/kernel"),
    "smollm2-down-1024": Shape(221_184, 4, 1024, "model/layers/15/mlp/down_proj/kernel"),
    "smollm2-q-1024": Shape(82_944, 4, 1024, "model/layers/7/self_attn/q_proj/kernel"),
    "smollm2-q-4096": Shape(82_944, 4, 4096, "model/layers/7/self_attn/q_proj/kernel"),
    "smollm2-k-1024": Shape(27_648, 4, 1024, "model/layers/20/self_attn/k_proj/kernel"),
}


def weight_like(count: int, g: int) -> np.ndarray:
    """Vectors [count, g]: rows of 4096 numbers, Student-t with 8 degrees of freedom, each row of a log-normal scale."""
    rng = np.random.default_rng(0)
    rows = -(-count * g // 4096)
    numbers = np.empty((rows, 4096), np.float32)
    for row in range(0, rows, 1024):
        part = numbers[row : row + 1024]
        part[:] = rng.standard_t(8, part.shape) * np.exp(0.3 * rng.standard_normal((len(part), 1)))
    return numbers.reshape(-1)[: count * g].reshape(count, g)


def real_weights(matrix: str, g: int) -> np.ndarray:
    """The vectors of a matrix of SmolLM2-135M, as `compress` cuts them."""
    _, _, layer, path = matrix.split("/", 3)
    block = open_model(find_model()).source.load_block(int(layer))
    kernel = trees.flatten(block)[path]
    return np.asarray(to_vectors(jnp.asarray(kernel), g=g, axis="out"))


def fit_ours(vectors: np.ndarray, shape: Shape, iterations: int) -> tuple[float, KMeansStats]:
    began = time.perf_counter()
    codebook, index, stats = fit_codebook(
        vectors, num_codes=shape.num_codes, key=jax.random.key(0), iterations=iterations
    )
    jax.block_until_ready((codebook, index))
    return time.perf_counter() - began, stats


def fit_faiss(vectors: np.ndarray, shape: Shape, iterations: int) -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    clustering = faiss.Clustering(shape.g, shape.num_codes)
    clustering.niter = iterations
    clustering.max_points_per_centroid = len(vectors)
    clustering.min_points_per_centroid = 1
    clustering.train(vectors, faiss.IndexFlatL2(shape.g))
    codes = faiss.vector_to_array(clustering.centroids).reshape(shape.num_codes, shape.g)
    return time.perf_counter() - began, codes


def faiss_error(vectors: np.ndarray, codes: np.ndarray) -> float:
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(codes)
    parts = range(0, len(vectors), 1 << 20)
    return float(sum(index.search(vectors[i : i + (1 << 20)], 1)[0].sum(dtype=np.float64) for i in parts))


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_shape(name: str, options: argparse.Namespace) -> None:
    """Prints the rows of one shape."""
    shape = SHAPES[name]
    keep_freed_memory()
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    vectors = real_weights(shape.matrix, shape.g) if shape.matrix else weight_like(shape.vectors, shape.g)
    energy = float(np.square(vectors, dtype=np.float64).sum())
    before = peak_gib()
    # The first round compiles; faiss is timed between ours, so that both meet the same machine.
    compiled = {i: fit_ours(vectors, shape, i)[0] for i in options.iterations}
    memory = peak_gib() - before
    ours: dict[int, list[float]] = {i: [] for i in options.iterations}
    errors: dict[int, float] = {}
    certified: dict[int, float] = {}
    theirs, their_error = [], float("nan")
    for round_ in range(options.rounds):
        seconds, codes = fit_faiss(vectors, shape, options.faiss_iterations)
        theirs.append(seconds * FAISS_ITERATIONS / options.faiss_iterations)
        if round_ == 0 and options.faiss_iterations == FAISS_ITERATIONS:
            their_error = faiss_error(vectors, codes) / energy
        for i in options.iterations:
            seconds, stats = fit_ours(vectors, shape, i)
            ours[i].append(seconds)
            errors[i], certified[i] = stats.inertia[-1] / energy, stats.certified
    reference = statistics.median(theirs)
    for i in options.iterations:
        median = statistics.median(ours[i])
        print(
            f"| {name} | {len(vectors):,} | {shape.g} | {shape.num_codes:,} | {i} | {median:.2f} | {reference:.2f} "
            f"| {reference / median:.1f} | {errors[i]:.5f} | {their_error:.5f} | {errors[i] / their_error:.3f} "
            f"| {certified[i]:.2f} | {memory:.2f} | {max(compiled[i] - median, 0):.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=list(SHAPES), help="which shapes")
    parser.add_argument("--iterations", type=int, nargs="*", default=[5, 10, 20], help="of ours")
    parser.add_argument("--faiss-iterations", type=int, default=FAISS_ITERATIONS, help="fewer are extrapolated to 20")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turn; medians are printed")
    parser.add_argument("--no-header", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.no_header:
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "faiss-cpu"))
        how = "" if options.faiss_iterations == FAISS_ITERATIONS else f"; extrapolated from {options.faiss_iterations}"
        print(f"{versions}; {len(os.sched_getaffinity(0))} cores, {jax.default_backend()}; faiss: 20 iterations{how}")
        print(
            "| shape | m | g | n | iterations | s | faiss s | ratio | error | faiss error | ratio | certified "
            "| peak GiB beyond vectors | compile s |\n" + "|---" * 14 + "|",
            flush=True,
        )
    if len(options.shape) == 1:
        bench_shape(options.shape[0], options)
        return
    # A process per shape: peak memory and compile time are its own.
    for name in options.shape:
        command = [sys.executable, str(Path(__file__).resolve()), "--no-header", "--shape", name]
        command += ["--iterations", *map(str, options.iterations), "--rounds", str(options.rounds)]
        subprocess.run([*command, "--faiss-iterations", str(options.faiss_iterations)], check=True)


if __name__ == "__main__":
    main()
