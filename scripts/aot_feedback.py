"""Compiles statistics and error feedback for a card that need not be here, and prints the memory of each program.

The numbers are XLA's own buffer assignment, ahead of time; nothing runs. "live" is what else the run holds on the
device meanwhile: the block's weights and the moments or the factor of the site.

    pip install ".[aot]"
    python scripts/aot_feedback.py                       # Llama-2-70B's down_proj on an RTX A6000
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # still registers the CUDA compiler, and looks for no card

import jax
import jax.numpy as jnp
from aot_kmeans import A6000, GIB, describe, total_bytes

from cluscomp_jax import correction, feedback, refit, statistics, trees
from cluscomp_jax.kmeans import plant_forest
from cluscomp_jax.llama import LlamaConfig
from cluscomp_jax.model import build_model

SITE, PATH = "mlp/hidden", "mlp/down_proj/kernel"


def programs(config: LlamaConfig, tokens: int, g: int, n: int, on_card: Any) -> dict[str, tuple[Any, int]]:
    """Returns {program: (traced, bytes that the run holds besides its arguments)} in the order in which they run."""
    model = build_model(config)
    kind = model.block_kind(0)

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_card)

    flat = {path: array(*shape, dtype=jnp.bfloat16) for path, shape in model.block_shapes(0).items()}
    block = trees.unflatten(flat)
    d_in, d_out = model.block_shapes(0)[PATH]
    weights, kernel = total_bytes(block), array(d_in, d_out, dtype=jnp.bfloat16)
    inputs, errors, moved = array(d_in, d_in), array(d_in, d_out), array(d_in, d_out)
    x = array(1, tokens, config.hidden_size, dtype=jnp.bfloat16)
    batch = statistics.Batch(x, x, array(1, tokens))
    sums = {"inputs": inputs, "errors": errors}
    fed = feedback.Feedback(array(d_in, dtype=jnp.int32), array(d_in, d_in))
    codes = array(n, g)
    grown = jax.eval_shape(partial(plant_forest, key=jax.random.key(0)), codes)
    search = {"g": g, "forest": jax.tree.map(lambda part: array(*part.shape, dtype=part.dtype), grown)}
    index = array(d_in, -(-d_out // g), dtype=jnp.int32)
    held = weights  # the decoded kernels of the block are given up behind the statistics of its last site
    seen = statistics._add_pair.trace(sums, batch, model=model, kind=kind, site=SITE, block=block, original=block)
    return {
        "statistics": (seen, 0),
        "root for the correction": (correction._ridge_root.trace(inputs, 1.0), held + total_bytes(errors)),
        "correction": (
            correction._moved.trace(kernel, inputs, None, errors),
            held - total_bytes(kernel) + total_bytes(inputs),
        ),
        "root for feedback": (feedback._factorise.trace(inputs, 0.01), held + total_bytes(moved)),
        "assignment": (feedback.assign_with_feedback.trace(moved, codes, fed, **search), held),
        "new codes": (refit.improved_index.trace(moved, codes, index, fed, **search), held),
        "new codebook": (refit.least_squares_codebook.trace(moved, codes, index, fed), held),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=8192, help="width of the model")
    parser.add_argument("--inner", type=int, default=28672, help="d_in of down_proj")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of one sample")
    parser.add_argument("--g", type=int, default=4, help="weights per vector")
    parser.add_argument("--codes", type=int, default=65500, help="n")
    parser.add_argument("--target", type=Path, default=A6000, help="description of the card")
    options = parser.parse_args()
    heads = options.hidden // 128
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        head_dim=128,
        num_key_value_heads=min(8, heads),
    )
    traced = programs(config, options.tokens, options.g, options.codes, describe(options.target))
    print(f"jax {jax.__version__}, {options.target.stem}, ahead of time: down_proj {options.inner} x {options.hidden}")
    print("| program | arguments GiB | outputs GiB | temporaries GiB | live GiB | all GiB |\n" + "|---" * 6 + "|")
    largest = 0.0
    for name, (program, held) in traced.items():
        memory = program.lower().compile().memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        parts = [memory.argument_size_in_bytes, outputs, memory.temp_size_in_bytes, held]
        parts.append(sum(parts))
        largest = max(largest, parts[-1])
        print(f"| {name} | " + " | ".join(f"{part / GIB:.3f}" for part in parts) + " |", flush=True)
    print(f"largest: {largest / GIB:.3f} GiB")


if __name__ == "__main__":
    main()
