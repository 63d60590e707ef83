"""One run as its programs see it: a layer type, the sizes of batches, and the devices of the arrays."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax.numpy as jnp

from cluscomp_jax.clustering.resolve import Rules, rules_by_block
from cluscomp_jax.clustering.tied_codebooks import sharing_groups
from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.model import Model, width
from cluscomp_jax.plan.shapes import AbstractDevice

STORED = jnp.dtype("bfloat16")
"""The dtype that original parameters are taken to have; float16 takes as much."""


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """The blocks of one layer type in one run.

    Attributes:
      model: the decoder.
      cfg: the run, calibration given.
      place: the device.
      layer_type: of the block.
      shapes: {block-relative path: shape} of its parameters.
      rules: {block-relative path: rule} of its kernels.
      members: numbers of the blocks that are alike.
      batch: samples of a forward pass.
    """

    model: Model
    cfg: CompressConfig
    place: AbstractDevice
    layer_type: Hashable
    shapes: Mapping[str, tuple[int, ...]]
    rules: Rules
    members: tuple[int, ...]
    batch: int

    @property
    def blocks(self) -> int:
        """How many blocks of the model are alike."""
        return len(self.members)

    def repeated(self, count: int) -> "BlockSpec":
        """Returns the setting of so many times as many blocks: what is done `count` times in each is planned once."""
        return dataclasses.replace(self, members=self.members * count)

    @property
    def sharing(self) -> list[tuple[str, ...]]:
        """The kernels that share a codebook, group by group, the owner first."""
        return sharing_groups(self.model.input_groups, self.rules, self.cfg.cluster.tie_codebooks)

    @property
    def numbers(self) -> BlockTuningConfig:
        """The settings that decide dtypes; the defaults where nothing is tuned."""
        return self.cfg.tuning or BlockTuningConfig()

    @property
    def compute(self) -> Any:
        """The dtype of activations on the device."""
        return jnp.dtype(compute_dtype_of(self.numbers, None if self.place.sharding is None else "gpu"))

    @property
    def passes(self) -> float:
        """Forward passes of one stream through all these blocks."""
        return self.blocks * -(-self.cfg.calibration.samples // self.batch)

    def activations(self, samples: int, dtype: Any = None) -> Any:
        """Returns activations [samples, length, d]."""
        return self.place.array(samples, self.cfg.calibration.length, width(self.model), dtype=dtype or self.compute)

    def dense(self) -> Params:
        """Returns the original parameters of a block."""
        return self.place.tree(self.shapes, STORED)

    def compressed(self, *, tuned: bool = True) -> Params:
        """Returns the block as it is stored (`tuned`), or as it is before tuning."""
        codebook_dtype = self.cfg.cluster.codebook_dtype
        flat: dict[str, Any] = {}
        owners = {path: group[0] for group in self.sharing for path in group[1:]}
        for path, shape in self.shapes.items():
            if path in self.rules:
                array = self.place.compressed((shape[0], shape[1]), self.rules[path], codebook_dtype)
                flat[path] = dataclasses.replace(array, tied_to=owners.get(path))
            else:
                trained = tuned and len(shape) == 1 and self.cfg.tuning is not None and self.cfg.tuning.norms
                flat[path] = self.place.array(*shape, dtype=codebook_dtype if trained else STORED)
        return trees.unflatten(flat)

    def decoded(self) -> Params:
        """Returns the stored block with every kernel decoded."""
        flat = trees.flatten(self.compressed())
        for path, leaf in flat.items():
            if isinstance(leaf, CodebookArray):
                flat[path] = self.place.array(*leaf.shape, dtype=leaf.dtype)
        return trees.unflatten(flat)


def layer_types_of(model: Model, cfg: CompressConfig, place: AbstractDevice, batch: int) -> list[BlockSpec]:
    """Returns a BlockSpec for each layer type, by what distinguishes its programs; a bit budget is spent evenly.

    Args:
      batch: samples of a forward pass.

    Raises:
      InputError: a rule matches nothing, or a budget cannot be met.
    """
    layer_types: dict[Any, BlockSpec] = {}
    for i, rules in enumerate(rules_by_block(model, cfg)):
        shapes = model.block_shapes(i)
        key = (model.layer_type(i), tuple(shapes.items()), tuple(rules.items()))
        previous = layer_types.get(key)
        layer_types[key] = (
            BlockSpec(model, cfg, place, model.layer_type(i), shapes, rules, (i,), batch)
            if previous is None
            else dataclasses.replace(previous, members=(*previous.members, i))
        )
    return list(layer_types.values())
