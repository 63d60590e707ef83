"""A toy family of decoders and its compressed parameters, for the tests of checkpoints: shapes without any maths."""

import dataclasses
import sys

import ml_dtypes
import numpy as np

from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.model import register_family


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    num_blocks: int = 3
    d: int = 12
    model_type: str = "toy_checkpoint"


class ToyModel:
    blocks_path = "model/layers"

    def __init__(self, config):
        self.config = config
        self.num_blocks = config.num_blocks

    def block_shapes(self, i):
        d = self.config.d
        return {
            "attn/q/kernel": (d, d),
            "attn/k/kernel": (d, d + 1),
            "mlp/up/kernel": (d, 2 * d),
            "mlp/down/kernel": (2 * d, d),
            "mlp/gate/kernel": (d, 5),
            "norm/weight": (d,),
            "attn/q/bias": (d,),
        }

    def outer_shapes(self):
        return {"model/embed/embedding": (20, self.config.d), "model/norm/weight": (self.config.d,)}


def parse_config(fields):
    return ToyConfig(fields["num_blocks"], fields["d"])


def to_hf_dict(config):
    return dataclasses.asdict(config)


def build(config):
    return ToyModel(config)


register_family("toy_checkpoint", sys.modules[__name__])


def matrix(rng, shape, *, g, n, axis="out", dtype=ml_dtypes.bfloat16):
    d_in, d_out = shape
    index_shape = (d_in, -(-d_out // g)) if axis == "out" else (-(-d_in // g), d_out)
    index = rng.integers(0, n, index_shape).astype(np.uint8 if n <= 256 else np.uint16)
    return CodebookArray(rng.standard_normal((n, g)).astype(dtype), index, (d_in, d_out), axis)


def toy_block(config, i):
    """Every kind of leaf: uint8 and uint16 indices, both axes, padding, one code, both dtypes, dense."""
    rng = np.random.default_rng(i)
    d = config.d
    return {
        "attn": {
            "q": {"kernel": matrix(rng, (d, d), g=4, n=256), "bias": rng.standard_normal(d).astype(np.float32)},
            "k": {"kernel": matrix(rng, (d, d + 1), g=4, n=257, dtype=np.float16)},
        },
        "mlp": {
            "up": {"kernel": matrix(rng, (d, 2 * d), g=5, n=1000, axis="in")},
            "down": {"kernel": matrix(rng, (2 * d, d), g=3, n=1)},
            "gate": {"kernel": rng.standard_normal((d, 5)).astype(ml_dtypes.bfloat16)},
        },
        "norm": {"weight": np.zeros(d, np.float16)},
    }


def toy_outer(config):
    rng = np.random.default_rng(99)
    return {
        "model": {
            "embed": {"embedding": rng.standard_normal((20, config.d)).astype(ml_dtypes.bfloat16)},
            "norm": {"weight": np.ones(config.d, np.float32)},
        }
    }


def toy_params(config):
    params = toy_outer(config)
    params["model"]["layers"] = {str(i): toy_block(config, i) for i in range(config.num_blocks)}
    return params


@dataclasses.dataclass(frozen=True)
class ToyRun:
    """A run config of the toy family."""

    model: ToyConfig = ToyConfig()
    seed: int = 42

    def to_dict(self):
        return {"seed": self.seed, "cluster": {"bits": 2.5, "rules": ["a", "b"]}}
