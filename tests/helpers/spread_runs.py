"""A program of its own, because a process has as many devices as it began with: compression spread over two.

`python spread_runs.py OUT.json` writes what tests/test_pipeline_mesh.py judges.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax import llama
from cluscomp_jax.clustering import block
from cluscomp_jax.clustering.matrix import decompress
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.models.source import DictSink, DictSource
from cluscomp_jax.pipeline import compress_stream

CONFIG = llama.LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    initializer_range=0.3,
)  # fmt: skip  (all kernels of one shape: less to compile)
MODEL = llama.build(CONFIG)
TUNING = BlockTuningConfig(epochs=2, batch_size=4, learning_rate=0.01, validation_samples=3)
RUN = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=12),), iterations=4),
    calibration=CalibrationConfig(samples=11, length=12),
    tuning=TUNING,
)
BLIND = ClusterConfig(rules=RUN.cluster.rules, iterations=4, weighted=False, error_feedback=False)
RUNS = {
    "tuned": RUN,
    "without text": dataclasses.replace(RUN, cluster=BLIND, tuning=None),
}
MESHES = {"one": MeshConfig(), "two": MeshConfig(data=2)}
TOKENS = np.random.default_rng(0).integers(0, 60, (11, 12))


def run(cfg: CompressConfig, calibration: np.ndarray | None) -> dict:
    """The records of a run, its decoded kernels, the device of each matrix, and where the samples of batches lay."""
    where: dict[str, str] = {}
    samples: set[str] = set()
    cluster, hessians = block._cluster, block.collect_hessians

    def clustered(job, *arguments):
        (device,) = jnp.zeros(()).devices()
        where[f"{job.i}/{arguments[-1]}"] = str(device)
        return cluster(job, *arguments)

    def watched(*arguments, **options):
        *front, batches = arguments
        seen = list(batches)
        samples.update(str(getattr(batch.x.sharding, "spec", None)) for batch in seen)
        return hessians(*front, seen, **options)

    block._cluster, block.collect_hessians = clustered, watched
    sink = DictSink()
    with tempfile.TemporaryDirectory() as work:
        params = llama.init_params(CONFIG, jax.random.key(0))
        summary = compress_stream(DictSource(params, MODEL), sink, cfg, calibration=calibration, work_dir=Path(work))
    block._cluster, block.collect_hessians = cluster, hessians
    kernels = {
        path: np.asarray(leaf, np.float32).tolist()
        for path, leaf in trees.flatten(decompress(sink.params(MODEL))).items()
    }
    return {"blocks": summary.blocks, "kernels": kernels, "devices": where, "samples": sorted(samples)}


def main() -> None:
    runs = {
        name: {
            devices: run(dataclasses.replace(cfg, mesh=mesh), None if cfg.tuning is None else TOKENS)
            for devices, mesh in MESHES.items()
        }
        for name, cfg in RUNS.items()
    }
    Path(sys.argv[1]).write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
