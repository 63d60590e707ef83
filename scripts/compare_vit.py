"""A small vision transformer in linen, its blocks clustered blind, calibrated, and calibrated and tuned.

Prints the relative error of the logits, each against the original's, with the lines that a user writes between the two
rules below. The model knows nothing of cluscomp_jax: 3 blocks of 32 channels, random weights, 32 random images.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

WIDTH, HEADS, HIDDEN, BLOCKS, CLASSES = 32, 4, 96, 3, 10


class Block(nn.Module):  # type: ignore[misc]
    """One block: attention, then an MLP."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, t, d] -> y of its shape."""
        normed = nn.LayerNorm(name="ln1")(x)
        q, k, v = (
            nn.Dense(WIDTH, name=name)(normed).reshape(*x.shape[:2], HEADS, WIDTH // HEADS) for name in ("q", "k", "v")
        )
        x = x + nn.Dense(WIDTH, name="out")(nn.dot_product_attention(q, k, v).reshape(x.shape))
        hidden = nn.gelu(nn.Dense(HIDDEN, name="fc1")(nn.LayerNorm(name="ln2")(x)))
        y: jax.Array = x + nn.Dense(WIDTH, name="fc2")(hidden)
        return y


class ViT(nn.Module):  # type: ignore[misc]
    """Patches of 4 x 4, blocks, a linear head over the mean."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [b, 16, 16, 3] -> logits [b, CLASSES]."""
        x = nn.Conv(WIDTH, (4, 4), (4, 4), name="patch")(images).reshape(images.shape[0], -1, WIDTH)
        for i in range(BLOCKS):
            x = Block(name=f"block_{i}")(x)
        logits: jax.Array = nn.Dense(CLASSES, name="head")(x.mean(1))
        return logits


def main() -> int:
    vit, block = ViT(), Block()
    images = jax.random.normal(jax.random.key(2), (32, 16, 16, 3))
    params = vit.init(jax.random.key(3), images)["params"]
    original = vit.apply({"params": params}, images)
    patches = nn.Conv(WIDTH, (4, 4), (4, 4)).apply({"params": params["patch"]}, images).reshape(32, -1, WIDTH)

    # ------------------------------------------------------------------------------------------------------------------
    from cluscomp_jax import BlockTuningConfig, CompressConfig, CompressionRule, cluster_tree, compress_blocks
    from cluscomp_jax.integrations import linen

    blocks = [params[f"block_{i}"] for i in range(BLOCKS)]
    rule = CompressionRule(pattern="(q|k|v|out|fc1|fc2)/kernel", group_size=4, num_codes=64)

    def apply(params: Any, x: jax.Array) -> Any:
        return block.apply({"params": params}, x)

    def logits(blocks: Any) -> Any:
        replaced = {**params, **{f"block_{i}": found for i, found in enumerate(blocks)}}
        return linen.apply(vit, {"params": replaced}, images)

    tuned, _ = compress_blocks(blocks, apply, patches, CompressConfig(tuning=BlockTuningConfig(epochs=8)), rules=[rule])
    calibrated, _ = compress_blocks(blocks, apply, patches, CompressConfig(tuning=None), rules=[rule])
    # ------------------------------------------------------------------------------------------------------------------
    named = {"blocks": {str(i): found for i, found in enumerate(blocks)}}
    blind = cluster_tree(named, [CompressionRule(pattern=r"blocks/\d/\w+/kernel", group_size=4, num_codes=64)])
    results = {"blind": list(blind["blocks"].values()), "calibrated": calibrated, "calibrated and tuned": tuned}
    for name, found in results.items():
        error = jnp.linalg.norm(logits(found) - original) / jnp.linalg.norm(original)
        print(f"{name:21} relative error of the logits {float(error):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
