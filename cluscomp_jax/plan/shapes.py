"""Arrays that are shapes only, placed on a device, and the bytes they would take there."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.trees import Params

_shape_only: Any = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class AbstractDevice:
    """A device on which arrays are imagined.

    Attributes:
      sharding: of all arrays; None leaves it to JAX.
    """

    sharding: Any = None

    def array(self, *shape: int, dtype: Any = "float32") -> Any:
        """Returns an array [shape] that is not there."""
        return _shape_only(shape, dtype, sharding=self.sharding)

    def like(self, tree: Any) -> Any:
        """Returns the tree, its leaves (anything with shape and dtype) placed here."""
        return jax.tree.map(lambda leaf: _shape_only(leaf.shape, leaf.dtype, sharding=self.sharding), tree)

    def key(self) -> Any:
        """Returns a random key."""
        return self.like(jax.eval_shape(jax.random.key, 0))

    def tree(self, shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> Params:
        """Returns the nested tree of {path: shape}."""
        return trees.unflatten({path: self.array(*shape, dtype=dtype) for path, shape in shapes.items()})

    def compressed(self, shape: tuple[int, int], rule: CompressionRule, dtype: Any) -> CodebookArray:
        """Returns what a kernel [d_in, d_out] becomes under a rule, codebook in `dtype`."""
        index_shape, index_dtype = rule.coding.index_spec(rule.form(shape))
        index = self.array(*index_shape, dtype=index_dtype)
        codebook = self.array(rule.num_codes, rule.group_size, dtype=dtype)
        return CodebookArray(codebook, index, shape, rule.axis, coding=rule.coding)


def with_shardings(tree: Any, places: Any) -> Any:
    """Returns the tree of shapes, each placed as the same leaf of `places` says."""
    return jax.tree.map(lambda leaf, place: _shape_only(leaf.shape, leaf.dtype, sharding=place), tree, places)


def nbytes(tree: Any) -> int:
    """Returns the bytes that a device holds of all leaves but random keys, which are a few."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)]
    return sum(math.prod(_part(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _part(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of the part of a leaf that one device holds."""
    place = getattr(leaf, "sharding", None)
    shape: tuple[int, ...] = leaf.shape if place is None else place.shard_shape(leaf.shape)
    return shape
