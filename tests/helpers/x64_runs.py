"""What `test_x64.py` runs in a process of its own, with and without JAX's 64-bit types: what comes out, as JSON."""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from family_cases import fields_of, random_params

from cluscomp_jax import compress, generate, kmeans, llama, perplexity
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.models.decoder import forward
from cluscomp_jax.models.model import build_model, parameter_shapes, parse_model_config
from pallas_kernels.codebook_matmul import codebook_matmul

CONFIG = llama.LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def digest(tree):
    """Returns a digest of dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        found.update(f"{leaf.dtype} {leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def kernels():
    """Returns the product, its gradients and the dtypes, of the GPU kernels in Pallas' interpreter."""
    rng = np.random.default_rng(1)
    x, codebook = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    index = rng.integers(0, 9, (16, 6)).astype(np.uint8)
    out = []
    for fast in (False, True):
        y, pull = jax.vjp(
            lambda x, c, fast=fast: codebook_matmul(
                x, c, index, shape=(16, 24), axis="out", implementation="interpret", atomic_gradients=fast
            ),
            x,
            codebook,
        )
        out += [y, *pull(y)]
    return digest(out)


def main(out: Path) -> None:
    rng = np.random.default_rng(0)
    flat = {p: rng.normal(0, 0.3, s).astype(np.float32) for p, s in parameter_shapes(build_model(CONFIG)).items()}
    params, tokens = trees.unflatten(flat), rng.integers(0, 32, (4, 16)).astype(np.int32)
    vectors = rng.normal(size=(4096, 4)).astype(np.float32)
    results = {"x64": bool(jax.config.jax_enable_x64)}
    for n in (64, 300, 2000):
        fit = kmeans.fit_codebook(vectors, num_codes=n, key=jax.random.key(0), iterations=3)
        results[f"fit_codebook to {n}"] = digest(fit[:2])
    results["assign"] = digest(kmeans.assign(vectors, vectors[:100]))
    for codes in (16, 300):
        cluster = ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=codes),), iterations=3, refine_rounds=1)
        cfg = CompressConfig(
            model=CONFIG, cluster=cluster, calibration=CalibrationConfig(samples=4, length=16), tuning=None
        )
        results[f"compress to {codes}"] = digest(compress(params, cfg, calibration=tokens))
    results["compress without text"] = digest(compress(params, cfg))
    tuned = CompressConfig(
        model=CONFIG,
        cluster=cluster,
        calibration=cfg.calibration,
        tuning=BlockTuningConfig(epochs=1, validation_samples=1),
    )
    results["tuned shapes"] = [
        f"{leaf.dtype} {leaf.shape}" for leaf in jax.tree.leaves(compress(params, tuned, calibration=tokens))
    ]
    results["perplexity"] = round(perplexity(params, tokens.reshape(-1), CONFIG, context=16).perplexity, 3)
    results["tokens"] = generate(params, [1, 2, 3], CONFIG, max_new_tokens=5).tolist()
    mixture = parse_model_config(fields_of("mixtral"))
    results["experts"] = digest(forward(random_params(mixture), tokens, mixture))
    results["kernels"] = kernels()
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
