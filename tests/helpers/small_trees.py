"""Trees of the kinds that JAX codebases have: a dataclass, an nnx module, variables of linen in boxes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


@partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    w: jax.Array
    b: jax.Array
    name: str


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(8, 12, rngs=nnx.Rngs(i)) for i in range(2)])


def linen_variables():
    kernel_init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
    return nn.Dense(12, kernel_init=kernel_init).init(jax.random.key(0), jnp.ones((1, 8)))
