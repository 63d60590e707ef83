"""Measures what 16-bit statistics and TensorFloat-32 products cost, by the output errors of single projections.

    cluscomp demo --fetch
    python scripts/measure_rounding.py --blocks 3 15

Runs on a CPU: TensorFloat-32 is emulated by rounding operands. A compressed stream is imitated by noise in all kernels.
The first projection of each input group is corrected for drift, coded by error feedback and refined. Its error is that
of the block's outputs on the calibration text, by statistics summed in float64, next to that of the reference.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cluscomp_jax
from cluscomp_jax import data, kmeans
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.clustering import drift_correction, error_feedback, hessian, refine
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.coders import to_vectors
from cluscomp_jax.clustering.drift_correction import LayerStatistics
from cluscomp_jax.core import trees
from cluscomp_jax.core.second_moments import MATRIX_UNITS
from cluscomp_jax.models.model import run_block, run_embed
from cluscomp_jax.models.streams import Batch, weigh_tokens
from cluscomp_jax.text.text import load_tokens

LENGTH, G = 512, 4
Rounding = Callable[[jax.Array], jax.Array]


def kept_bits(added: int) -> Rounding:
    """Returns the rounding of float32 to 11 bits; `added` before the other 13 are cut off."""

    def rounded(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(added)
        return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFE000), jnp.float32)

    return rounded


class RoundedProducts:
    """jax.numpy with the operands of MATRIX_UNITS products rounded."""

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def dot(self, left: jax.Array, right: jax.Array, *, precision: Any = None) -> jax.Array:
        """Returns the product, of rounded operands where the precision is MATRIX_UNITS, else of float32."""
        if precision == MATRIX_UNITS:
            left, right = self.rounding(left), self.rounding(right)
        return jnp.dot(left, right, precision="highest")


def use(rounding: Rounding | None) -> None:
    for module in (drift_correction, error_feedback, refine):
        module.jnp = jnp if rounding is None else RoundedProducts(rounding)  # type: ignore[attr-defined]
    jax.clear_caches()


def noisy(block: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def changed(weight: jax.Array) -> jax.Array:
        return (weight * (1 + 0.3 * rng.standard_normal(weight.shape))).astype(weight.dtype)

    return jax.tree.map(lambda leaf: changed(leaf) if leaf.ndim == 2 else leaf, block)


def statistics64(model: Any, kind: Any, group: str, block: Any, original: Any, batches: list[Batch]) -> list[Any]:
    """Returns [Hessian, drift or None, errors or None] in float64."""
    sums: list[Any] = [0.0, None, None]
    for batch in batches:
        x, onto, _ = hessian._at_groups(model, kind, [group], block, batch.x)[group]
        wanted, wanted_onto, _ = hessian._at_groups(model, kind, [group], original, batch.original)[group]
        x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
        weighted, place, e = x * np.asarray(batch.weights, np.float64).reshape(-1, 1), 1, wanted - x
        if onto is not None and wanted_onto is not None:
            (path,) = model.input_groups[group]
            kernel = np.asarray(trees.flatten(original)[path], np.float64)
            place, e = 2, e @ kernel + np.asarray(wanted_onto, np.float64) - np.asarray(onto, np.float64)
        sums[0] = sums[0] + weighted.T @ x
        sums[place] = (0.0 if sums[place] is None else sums[place]) + weighted.T @ e
    count = sum(batch.x.shape[0] * batch.x.shape[1] for batch in batches)
    return [None if total is None else total / count for total in sums]


def coded(weight: jax.Array, statistics: LayerStatistics, codes: jax.Array, key: jax.Array) -> list[np.ndarray]:
    """Returns the kernel after error feedback, and after three refine rounds."""
    (moved,) = drift_correction.corrected([weight], statistics, ridge=1.0)
    factor, search = error_feedback.factor_hessian(statistics.hessian), NearestCodes().for_codebook(codes, key)
    index = error_feedback.assign_with_error_feedback(moved, codes, factor, search)
    refined = refine.refine(moved, codes, index, factor, search, rounds=3, key=key)
    pairs = ((codes, index), refined)
    return [np.asarray(c, np.float64)[np.asarray(i)].reshape(len(weight), -1)[:, : weight.shape[1]] for c, i in pairs]


def measure(model: Any, i: int, group: str, block: Any, batches: list[Batch], n: int) -> Iterator[tuple[str, Any]]:
    """Yields (variant, [error after error feedback, after refinement] over the reference's)."""
    kind, key, path = model.layer_type(i), jax.random.key(i), model.input_groups[group][0]
    other = noisy(block, 100 + i)
    exact = statistics64(model, kind, group, other, block, batches)
    reference = LayerStatistics(*(None if one is None else jnp.asarray(one, jnp.float32) for one in exact))
    narrow = hessian.collect_hessians(model, kind, [group], other, iter(batches), original=block)[group]
    noise = 1e-6 * np.random.default_rng(0).standard_normal(exact[0].shape)
    shaken = reference._replace(hessian=jnp.asarray(exact[0] * (1 + noise + noise.T), jnp.float32))
    weight = trees.flatten(block)[path].astype(jnp.float32)
    wide, vectors = np.asarray(weight, np.float64), to_vectors(weight, g=G, axis="out")
    codes = kmeans.fit_codebook(vectors, num_codes=n, key=key, iterations=10)[0].astype(jnp.float16)
    lacking = exact[1] @ wide if exact[2] is None else exact[2]
    damped = exact[0] + 1e-6 * np.mean(np.diag(exact[0])) * np.eye(len(wide))
    least = -np.sum(np.linalg.solve(damped, lacking) * lacking)

    def error(kernel: np.ndarray) -> float:
        change = kernel - wide
        return float(np.sum(change * (exact[0] @ change)) - 2 * np.sum(change * lacking) - least)

    nearest, cut = kept_bits(0x1000), kept_bits(0)
    base: list[float] = []
    for name, statistics, rounding in (
        ("reference", reference, None),
        ("Hessian with relative noise of 1e-6", shaken, None),
        ("16-bit products", narrow, None),
        ("TensorFloat-32, nearest", reference, nearest),
        ("TensorFloat-32, cut off", reference, cut),
        ("16-bit products, TensorFloat-32 cut off", narrow, cut),
    ):
        use(rounding)
        errors = [error(kernel) for kernel in coded(weight, statistics, codes, key)]
        base = base or errors
        yield name, np.divide(errors, base)
    use(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 15])
    parser.add_argument("--groups", nargs="+", help="input groups; all by default")
    parser.add_argument("--num-codes", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    opened = cluscomp_jax.open_model(find_model())
    model, source = opened.model, opened.source
    tokens = load_tokens(data.path("wiki_train"), opened.load_tokenizer())[: options.samples * LENGTH]
    outer = jax.tree.map(jnp.asarray, source.load_outer())
    rows = tokens.reshape(options.samples, 1, LENGTH).astype(np.int32)
    original = [run_embed(outer, row, model=model, dtype=jnp.dtype("bfloat16")) for row in rows]
    compressed, found = list(original), dict[str, list[Any]]()
    for i in range(max(options.blocks) + 1):
        block = jax.tree.map(jnp.asarray, source.load_block(i))
        fixed = {"model": model, "layer_type": model.layer_type(i)}
        if i in options.blocks:
            weights = [weigh_tokens(run_block(block, x, **fixed), limit=4.0) for x in original]
            batches = [Batch(*three) for three in zip(compressed, original, weights, strict=True)]
            for group in options.groups or model.input_groups:
                for name, ratios in measure(model, i, group, block, batches, options.num_codes):
                    found.setdefault(name, []).append(ratios)
                    print(f"block {i}, {group}: {name}: {ratios[0]:.5f} {ratios[1]:.5f}", flush=True)
        original = [run_block(block, x, **fixed) for x in original]
        changed = noisy(block, i)
        compressed = [run_block(changed, x, **fixed) for x in compressed]
    for name, ratios in found.items():
        mean, (_, least), (_, most) = np.mean(ratios, 0), np.min(ratios, 0), np.max(ratios, 0)
        print(f"| {name} | {len(ratios)} | {mean[0]:.4f} | {mean[1]:.4f} | {least:.4f}, {most:.4f} |")


if __name__ == "__main__":
    main()
