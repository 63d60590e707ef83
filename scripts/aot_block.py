"""Compiles forward and backward of one compressed decoder block for a card that need not be here; prints its memory.

The gradients are those of the codebooks and of the block's input, as block-wise tuning and finetuning need them. The
numbers are XLA's own buffer assignment, ahead of time; nothing runs.

    pip install ".[aot]"
    python scripts/aot_block.py                                 # a block of Llama-2-70B on an RTX A6000, all variants
    python scripts/aot_block.py --variant atomic --length 4096 --g 8 --target FILE.txtpb
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # still registers the CUDA compiler, and looks for no card

import jax
import jax.numpy as jnp

from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import index_dtype, index_shape
from cluscomp_jax.models.llama.model import LlamaModel
from cluscomp_jax.plan import compiling_for, find_target, placement, preset_config
from cluscomp_jax.tuning.blockwise import join_trainable, split_trainable
from pallas_kernels.codebook_matmul import ATOMIC_GRADIENTS, IMPLEMENTATION

GIB = 2**30
VARIANTS = {
    "decoded": "every kernel decoded by XLA",
    "ordered": "GPU kernels, fixed order",
    "atomic": "GPU kernels, atomics",
}


def compressed_block(model: LlamaModel, g: int, num_codes: int, axis: Any, dtype: Any) -> dict[str, Any]:
    """Returns the shapes of block 0: kernels as CodebookArrays, vectors in float32."""

    def leaf(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return jax.ShapeDtypeStruct(shape, jnp.float32)
        index = jax.ShapeDtypeStruct(index_shape(shape, g, axis), index_dtype(num_codes))
        return CodebookArray(jax.ShapeDtypeStruct((num_codes, g), dtype), index, shape, axis)

    return trees.unflatten({path: leaf(shape) for path, shape in model.block_shapes(0).items()})


def gradients(model: LlamaModel, frozen: dict[str, Any]) -> Callable[..., Any]:
    """Returns (trained, arrays of `frozen`, x, dy) -> (y, gradients of trained, gradient of x)."""
    static = jax.tree.structure(frozen)

    def step(trained: Any, frozen: Any, x: jax.Array, dy: jax.Array) -> Any:
        def block(trained: Any, x: jax.Array) -> jax.Array:
            params = join_trainable(trained, jax.tree.unflatten(static, frozen))
            return model.block(params, x, layer_type=model.layer_type(0))

        y, pull = jax.vjp(block, trained, x)
        return y, *pull(dy)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variant", choices=VARIANTS, help="only one of them")
    parser.add_argument("--length", type=int, default=2048, help="tokens T of the one sample")
    parser.add_argument("--g", type=int, default=4, help="weights per code")
    parser.add_argument("--codes", type=int, default=65500, help="codes per matrix")
    parser.add_argument("--axis", choices=("out", "in"), default="out")
    parser.add_argument("--target", default="a6000", help="card, or a .txtpb file that describes one")
    options = parser.parse_args()
    target = find_target(options.target)
    on_card, config = placement(target), preset_config("llama-2-70b")
    model = LlamaModel(config)
    block = compressed_block(model, options.g, options.codes, options.axis, jnp.bfloat16)
    trained, frozen = split_trainable(block, norms=False)
    x = jax.ShapeDtypeStruct((1, options.length, config.hidden_size), jnp.bfloat16)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_card),
        (trained, jax.tree.leaves(frozen), x, x),
    )
    print(f"jax {jax.__version__}, {target.name}, ahead of time: one block of Llama-2-70B, {vars(options)}")
    print("| variant | arguments GiB | outputs GiB | temporaries GiB | peak GiB | seconds |\n" + "|---" * 6 + "|")
    for variant in [options.variant] if options.variant else VARIANTS:
        began = time.monotonic()
        implementation = "definition" if variant == "decoded" else "triton"
        with compiling_for(target), IMPLEMENTATION(implementation), ATOMIC_GRADIENTS(variant == "atomic"):
            compiled = jax.jit(gradients(model, frozen)).trace(*arguments).lower().compile()
        memory = compiled.memory_analysis()
        sizes = [memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes]
        sizes.append(memory.peak_memory_in_bytes)
        print(
            f"| {variant} | " + " | ".join(f"{s / GIB:.3f}" for s in sizes) + f" | {time.monotonic() - began:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
