"""What `test_caller_mesh.py` runs on two virtual devices: {case: largest difference from one device, or the error}."""

import contextlib
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cluscomp_jax import compress, kmeans, llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.linear import linear
from cluscomp_jax.models.model import build_model, parameter_shapes

CONFIG = llama.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
RNG = np.random.default_rng(0)
PARAMS = trees.unflatten(
    {
        path: RNG.normal(0, 0.3, shape).astype(np.float32)
        for path, shape in parameter_shapes(build_model(CONFIG)).items()
    }
)
TOKENS = RNG.integers(0, 32, (4, 6)).astype(np.int32)
RUN = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),), iterations=2, refine_rounds=1),
    calibration=CalibrationConfig(samples=4, length=6),
    tuning=BlockTuningConfig(epochs=1),
)
CODEBOOK = RNG.normal(size=(16, 4)).astype(np.float32)
INDEX = RNG.integers(0, 16, (8, 4)).astype(np.uint8)
X = RNG.normal(size=(4, 3, 8)).astype(np.float32)
VECTORS = RNG.normal(size=(4096, 4)).astype(np.float32)
LAST, FIRST = "last axis", "first axis"


def put(tree, mesh, how):
    """Returns the tree on the mesh: whole on both devices, or split along the last or the first axis."""

    def one(array):
        array = np.asarray(array)
        spec = [None] * array.ndim
        axis = {LAST: -1, FIRST: 0}.get(how)
        if axis is not None and array.ndim and array.shape[axis] % 2 == 0:
            spec[axis] = "x"
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(one, tree)


def difference(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)


def cases(mesh, how, compressed):
    """Yields (name, function of nothing -> (what it is on the mesh, what it is on one device))."""
    kernel = CodebookArray(CODEBOOK, INDEX, (8, 16))
    dense = CODEBOOK[INDEX].reshape(8, 16)
    there = put(kernel, mesh, how)
    yield "linear", lambda: (linear(put(X, mesh, "whole"), there), X @ dense)
    yield "linear, rows split", lambda: (linear(put(X, mesh, FIRST), there), X @ dense)
    params, tokens = put(compressed, mesh, how), put(TOKENS, mesh, FIRST)
    logits = llama.forward(compressed, TOKENS, CONFIG)
    yield "forward", lambda: (llama.forward(params, TOKENS, CONFIG), logits)
    yield "forward, rows split", lambda: (llama.forward(params, tokens, CONFIG), logits)
    yield "jitted forward", lambda: (jax.jit(lambda p, t: llama.forward(p, t, CONFIG))(params, tokens), logits)


def long_cases(mesh, how, compressed):
    yield "compress", lambda: (compress(put(PARAMS, mesh, how), RUN, calibration=TOKENS), compressed)
    blind = compress(PARAMS, RUN)
    yield "compress without text", lambda: (compress(put(PARAMS, mesh, how), RUN), blind)
    fit = {"num_codes": 300, "key": jax.random.key(0), "iterations": 2}
    yield (
        "fit_codebook",
        lambda: (kmeans.fit_codebook(put(VECTORS, mesh, FIRST), **fit)[:2], kmeans.fit_codebook(VECTORS, **fit)[:2]),
    )


def gradient(mesh, how):
    """Returns the gradient of the codebook with rows split; inside `jax.set_mesh`, as for dense products."""
    x, kernel = put(X, mesh, FIRST), put(CodebookArray(CODEBOOK, INDEX, (8, 16)), mesh, how)

    def loss(codebook, x, kernel):
        return jnp.sum(jnp.square(linear(x, CodebookArray(codebook, kernel.index, (8, 16)))))

    expected = jax.grad(loss)(CODEBOOK, X, CodebookArray(CODEBOOK, INDEX, (8, 16)))
    return jax.jit(jax.grad(loss))(kernel.codebook, x, kernel), expected


def main(out: Path) -> None:
    compressed = compress(PARAMS, RUN, calibration=TOKENS)
    results = {}
    for kind, inside, how in itertools.product(AxisType, (False, True), ("whole", LAST, FIRST)):
        if kind == AxisType.Manual:
            continue  # the axes of a shard_map, which no array outside one has
        mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
        short = list(cases(mesh, how, compressed))
        chosen = [*short, *long_cases(mesh, how, compressed)] if how == LAST else short
        if inside:
            chosen.append(("gradient", lambda mesh=mesh, how=how: gradient(mesh, how)))
        with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
            for name, run in chosen:
                key = f"{name}; {kind.name} axes, {how}, {'inside' if inside else 'outside'} set_mesh"
                try:
                    results[key] = difference(*run())
                except Exception as error:  # the test shows which it was
                    results[key] = f"{type(error).__name__}: {error}"
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
