"""A mixture of experts in place of the MLP: a router chooses some experts for every position (Shazeer et al. 2017).

Positions are sorted by expert and padded to tiles of one expert each, so that shapes are static, no position is
dropped, and the work is that of the chosen experts. Sums are in a fixed order. Knows no block and no config of one.
Letters: m positions, k experts of a position, d channels, E experts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError

EVERY_POSITION = 0.05
"""What all positions together weigh in an expert's statistics, next to those that an average expert gets."""


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The experts of every layer; hashable.

    Attributes:
      count: how many a layer has, at least 2.
      per_position: how many of them a position goes through, from 1 to `count`.
      normalised: whether the shares of a position's experts are divided by their sum.
    """

    count: int
    per_position: int
    normalised: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.count, int) and 2 <= self.count <= 2**16):
            raise InputError(
                f"config: the number of experts is {self.count!r}; it must be an integer from 2 to {2**16}"
            )
        if not (isinstance(self.per_position, int) and 1 <= self.per_position <= self.count):
            raise InputError(
                f"config: num_experts_per_tok is {self.per_position!r}; it must be an integer from 1 to the "
                f"{self.count} experts"
            )


class Routing(NamedTuple):
    """Which experts a position goes through.

    Attributes:
      chosen: int32 [m, k], the experts of each position, the largest share first.
      shares: float32 [m, k], what the output of each is multiplied by.
    """

    chosen: jax.Array
    shares: jax.Array

    def weights(self, expert: int, config: ExpertsConfig) -> jax.Array:
        """Returns float32 [m], how much an error of an expert's output at each position counts.

        It is the squared share, and a little everywhere, so that the statistics of an expert which few positions reach
        are mostly those of all positions.
        """
        share = jnp.sum(jnp.where(self.chosen == expert, self.shares, 0.0), axis=1)
        of_average_expert = jnp.mean(jnp.sum(jnp.square(self.shares), axis=1)) / config.count
        return jnp.square(share) + EVERY_POSITION * of_average_expert


def route(logits: jax.Array, config: ExpertsConfig) -> Routing:
    """Returns the Routing of the router's logits [m, E]: those with the largest of the probabilities, float32."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, config.per_position)
    if config.normalised:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return Routing(chosen, shares)


def mix(x: jax.Array, routing: Routing, count: int, run: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Returns [m, d_out], the sum over a position's experts of its share times the expert's output.

    Args:
      x: [m, d].
      routing: of the positions.
      count: E.
      run: (expert, a traced int32; rows [r, d]) -> the expert's outputs [r, d_out].
    """
    m, k = routing.chosen.shape
    tile = _tile_size(m * k, count)
    if tile == 1:  # every pair of a position and an expert is a tile, in any order
        owner, position = routing.chosen.reshape(-1), jnp.repeat(jnp.arange(m, dtype=jnp.int32), k)[:, None]
        place = jnp.arange(m * k).reshape(m, k)
    else:
        owner, position, place = _tiles(routing.chosen, count, tile)
    # The backward pass computes a tile again, rather than to keep the decoded kernels of all tiles.
    once = jax.checkpoint(lambda tile: run(tile[0], x[tile[1]]), prevent_cse=False)
    outputs = jax.lax.map(once, (owner, position))
    each = outputs.reshape(-1, outputs.shape[-1])[place]
    return jnp.einsum("mkd,mk->md", each, routing.shares.astype(x.dtype))


def stacked(experts: Params) -> Params:
    """Returns {"stack": tree} of experts {"0": tree, …}, every array with a leading axis [E]; such a one is unchanged.

    CodebookArrays of one form are stacked as they are. Those of several forms, or next to dense kernels, are decoded.
    """
    if "stack" in experts:
        return experts
    each = [trees.flatten(experts[str(i)]) for i in range(len(experts))]
    return {"stack": trees.unflatten({path: _joined([expert[path] for expert in each]) for path in each[0]})}


def expert_at(experts: Params, expert: jax.Array) -> Params:
    """Returns the tree of one expert, a traced int32, of what `stacked` gives."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, CodebookArray):
            return dataclasses.replace(leaf, codebook=leaf.codebook[expert], index=leaf.index[expert])
        return leaf[expert]

    return trees.map_by_path(lambda _, leaf: one(leaf), experts["stack"])


def _joined(leaves: Sequence[Any]) -> Any:
    """Returns the leaves along a new first axis. A codebook that is tied is there as often as it is used."""
    coded = [leaf for leaf in leaves if isinstance(leaf, CodebookArray)]
    forms = {(leaf.form, leaf.coding, jnp.dtype(leaf.codebook.dtype)) for leaf in coded}
    if len(coded) < len(leaves) or len(forms) > 1:
        dense = [decode(leaf) if isinstance(leaf, CodebookArray) else jnp.asarray(leaf) for leaf in leaves]
        same = len({jnp.dtype(each.dtype) for each in dense}) == 1
        return jnp.stack(dense if same else [each.astype(jnp.float32) for each in dense])
    return dataclasses.replace(
        leaves[0],
        codebook=jnp.stack([jnp.asarray(leaf.codebook) for leaf in leaves]),
        index=jnp.stack([jnp.asarray(leaf.index) for leaf in leaves]),
        tied_to=None,
    )


def _tile_size(pairs: int, count: int) -> int:
    """Returns the rows of a tile: at most half of what an average expert gets, so that padding stays small."""
    return 1 << max(pairs // (2 * count), 1).bit_length() - 1


def _tiles(chosen: jax.Array, count: int, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (expert int32 [tiles], position int32 [tiles, tile], place int32 [m, k]).

    `position` names the row of x in each place of a tile; padding repeats some row. `place` is where the output of
    each pair is among all places.
    """
    m, k = chosen.shape
    flat, numbers = chosen.reshape(-1), partial(jnp.arange, dtype=jnp.int32)  # int32 whatever a caller's default is
    _, order = jax.lax.sort_key_val(flat, numbers(m * k), is_stable=True)
    held = jnp.zeros(count, jnp.int32).at[flat].add(1)
    needed = -(-held // tile)
    first_pair, ends = (jnp.cumsum(each, dtype=jnp.int32) for each in (held, needed))
    first_pair, first_place = first_pair - held, (ends - needed) * tile
    tiles = m * k // tile + min(count, m * k)
    owner = jnp.sum(numbers(tiles)[:, None] >= ends, axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, count - 1)
    within = numbers(tiles * tile).reshape(tiles, tile) - first_place[owner][:, None]
    pair = order[jnp.minimum(first_pair[owner][:, None] + within, m * k - 1)]
    rank = jnp.zeros(m * k, jnp.int32).at[order].set(numbers(m * k), unique_indices=True)
    place = first_place[flat] + rank - first_pair[flat]
    return owner, pair // k, place.reshape(m, k)
