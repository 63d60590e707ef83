"""A program of its own, because a process has as many devices as it began with: training on meshes of eight.

`python mesh_runs.py OUT.json` writes what tests/training/test_mesh.py judges.
"""

import contextlib
import dataclasses
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from family_cases import compressed, model_of_kinds
from training_models import batch, compressed_params

from cluscomp_jax import llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.sharded_kernel import ShardedKernel
from cluscomp_jax.finetuning import finetune
from cluscomp_jax.models.source import DictSource
from cluscomp_jax.plan.program import compile_program
from cluscomp_jax.plan.setting import layer_types_of
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.training_programs import finetuning
from cluscomp_jax.runtime.reporter import SilentReporter
from cluscomp_jax.text.token_rows import pack
from cluscomp_jax.training import init_state, make_sharding, split_params, summed_loss, train_step
from pallas_kernels.codebook_matmul import IMPLEMENTATION, codebook_matmul

STEPS, ROWS, LENGTH = 20, 16, 9
CONFIG = llama.LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.1,
)  # fmt: skip
MODEL = llama.build(CONFIG)
SETTINGS = TrainingConfig(
    steps=STEPS,
    batch_size=ROWS // 2,
    grad_accumulation_steps=2,
    trainable=(".*/codebook", ".*norm/weight", "lm_head/kernel"),
)
MESHES = {
    "one": MeshConfig(),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=8),
    "combined": MeshConfig(data=2, fsdp=2, tensor=2),
}


def train(settings: MeshConfig) -> dict:
    """Losses of STEPS steps, the first gradient, where arrays lie, and the collectives of the step."""
    params = compressed_params(odd_block=2, dtype=np.float32, config=CONFIG, n=16, scale=0.1)
    sharding = make_sharding(settings, MODEL)
    trained, frozen, layout = split_params(DictSource(params, MODEL), MODEL, SETTINGS.trainable, sharding)
    put = jnp.asarray if sharding is None else sharding.put_rows
    fixed = {"layout": layout, "settings": SETTINGS}
    tokens, loss_mask = batch(rows=ROWS, length=LENGTH, vocab=CONFIG.vocab_size)
    gradient = jax.jit(jax.grad(partial(summed_loss, **fixed)))(trained, frozen, put(tokens), put(loss_mask))
    places = {name: str(getattr(leaf.sharding, "spec", None)) for name, leaf in trees.iterate(trained)}
    places |= {
        name: str(getattr(leaf.index.sharding, "spec", None))
        for name, leaf in trees.iterate(frozen)
        if isinstance(leaf, CodebookArray)
    }
    state, losses = init_state(trained, settings=SETTINGS, sharding=sharding), []
    before = [leaf.sharding for leaf in jax.tree.leaves(state)]
    shape = (SETTINGS.grad_accumulation_steps, SETTINGS.batch_size, LENGTH)
    arguments = (frozen, put(tokens.reshape(shape)), put(loss_mask.reshape(shape)))
    step = train_step.lower(state, *arguments, **fixed).compile()
    for _ in range(STEPS):
        state, metrics = step(state, *arguments)
        losses.append(float(metrics.loss))
    return {
        "losses": losses,
        "gradient": {name: np.asarray(leaf).tolist() for name, leaf in trees.iterate(gradient)},
        "places": places,
        "moved": [leaf.sharding for leaf in jax.tree.leaves(state)] != before,
        "moments": [
            str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.optimizer) if sharding and leaf.ndim == 3
        ],
        "collectives": re.findall(r"= (.*) (all-reduce|all-gather|reduce-scatter)\(", step.as_text()),
    }


def patterned(settings: MeshConfig) -> list[float]:
    """Losses of three steps of a model whose layers repeat a pattern."""
    model = model_of_kinds([0, 0, 1] * 2 + [0])
    sharding = make_sharding(settings, model)
    trained, frozen, layout = split_params(
        DictSource(compressed(model), model), model, SETTINGS.trainable[:1], sharding
    )
    training = dataclasses.replace(SETTINGS, trainable=SETTINGS.trainable[:1], grad_accumulation_steps=1)
    put = jnp.asarray if sharding is None else sharding.put_rows
    rows = [put(each[None]) for each in batch(rows=SETTINGS.batch_size, length=LENGTH, vocab=CONFIG.vocab_size)]
    state, losses = init_state(trained, settings=training, sharding=sharding), []
    for _ in range(3):
        state, metrics = train_step(state, frozen, *rows, layout=layout, settings=training)
        losses.append(float(metrics.loss))
    return losses


def planned(settings: MeshConfig) -> dict:
    """What the plan of a step says that one device holds, and what XLA says of the program's arguments."""
    rules = ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),), weighted=False, error_feedback=False)
    blocks = layer_types_of(MODEL, CompressConfig(model=CONFIG, cluster=rules, tuning=None), AbstractDevice(), 1)
    cfg = FinetuneConfig(data=DataConfig(length=LENGTH), training=SETTINGS, mesh=settings)
    *_, step = finetuning(blocks, cfg, make_sharding(settings, MODEL))
    return {"held": step.live_bytes, "arguments": compile_program(step).argument_bytes}


class Interrupted(SilentReporter):
    """Keeps the losses of steps; raises after step `stop`."""

    def __init__(self, stop: int | None = None):
        self.losses, self.stop = [], stop

    def record(self, event, **fields):
        if event == "step":
            self.losses.append(fields["loss"])
            if fields["step"] == self.stop:
                raise KeyboardInterrupt


def resume() -> dict:
    """A run that is interrupted twice, and goes on on another mesh each time, and one on one device."""
    params = compressed_params(config=CONFIG, n=16, scale=0.1)
    rows = pack(batch(rows=1, length=180, vocab=CONFIG.vocab_size)[0][0], LENGTH)
    training = dataclasses.replace(SETTINGS, steps=6, grad_accumulation_steps=1, learning_rate=0.01)
    cfg = FinetuneConfig(model=CONFIG, training=training, save_every=2)
    meshes, stops = ("combined", "fsdp", "one"), (3, 5, None)
    with tempfile.TemporaryDirectory() as states:
        for mesh, stop in zip(meshes, stops, strict=True):
            reporter = Interrupted(stop)
            with contextlib.suppress(KeyboardInterrupt):
                found = finetune(
                    params,
                    rows,
                    dataclasses.replace(cfg, mesh=MESHES[mesh]),
                    evaluation=rows,
                    state_dir=states,
                    reporter=reporter,
                )
    expected = Interrupted()
    plain = finetune(params, rows, cfg, evaluation=rows, reporter=expected)
    found = trees.flatten(found)
    kernels = [(found[p], leaf) for p, leaf in trees.iterate(plain) if isinstance(leaf, CodebookArray)]
    return {
        "losses": [reporter.losses, expected.losses],
        "codebooks": max(float(np.max(np.abs(a.codebook - b.codebook))) for a, b in kernels),
        "indices": all(np.array_equal(a.index, b.index) for a, b in kernels),
    }


def kernel(side: str, implementation: str) -> list[float]:
    """Relative errors of value and both gradients of one sharded product against the plain one."""
    rng = np.random.default_rng(0)
    x, codebook = jnp.asarray(rng.normal(size=(4, 3, 16))), jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)
    index, weight = jnp.asarray(rng.integers(0, 12, (16, 8)), jnp.uint8), jnp.asarray(rng.normal(size=(4, 3, 32)))
    mesh = make_sharding(MESHES["combined"], MODEL).mesh

    def sharded(x, codebook):
        with IMPLEMENTATION(implementation):
            array = CodebookArray(codebook, index, (16, 32))
            return jnp.sum(weight * ShardedKernel(array, mesh, ("data", "fsdp"), "tensor", side).matmul(x))

    def plain(x, codebook):
        return jnp.sum(weight * codebook_matmul(x, codebook, index, shape=(16, 32), axis="out"))

    found, expected = (
        jax.tree.leaves(jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x.astype(jnp.float32), codebook))
        for f in (sharded, plain)
    )
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True)]


def main(out: Path) -> None:
    found = {name: train(mesh) for name, mesh in MESHES.items()}
    kernels = {f"{i}-{s}": kernel(s, i) for i in ("definition", "interpret") for s in ("in", "out")}
    plans = {name: planned(MESHES[name]) for name in ("one", "combined")}
    patterns = {name: patterned(MESHES[name]) for name in ("one", "combined")}
    found = {"meshes": found, "kernels": kernels, "resumed": resume(), "planned": plans, "patterned": patterns}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
