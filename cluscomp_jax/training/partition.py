"""What of a model trains and what is frozen, its blocks stacked so that a few scans run through them.

Two trees come out of one: the differentiated tree holds floating arrays only; an index is never in it. Knows no loss
and no optimiser.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, keeps_codes, round_codebook
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.sharding import OUTER, Sharding
from cluscomp_jax.models.source import ParamSource

_CODEBOOK = "/codebook"
_shape_only: Any = jax.ShapeDtypeStruct
_Parts = tuple[dict[str, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Span:
    """Blocks that differ in numbers alone, of one `layer_type`: `count` consecutive ones from `first` on, and as many
    after every `period` blocks, `repeats` times in all.
    """

    first: int
    count: int
    layer_type: Hashable
    repeats: int = 1
    period: int = 0

    @property
    def name(self) -> str:
        """The group of these blocks' arrays, each of which has them along a leading axis: "0-29", or "0-4x10"."""
        once = f"{self.first}-{self.first + self.count - 1}"
        return once if self.repeats == 1 else f"{once}x{self.repeats}"

    @property
    def members(self) -> tuple[int, ...]:
        """The numbers of the blocks, in order."""
        begins = [self.first + i * self.period for i in range(self.repeats)]
        return tuple(begin + i for begin in begins for i in range(self.count))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `split_params` laid a model out; hashable, a static argument of the step.

    Attributes:
      model: the decoder.
      sections: all its blocks, in order. The spans of one section have the same `repeats`, as often the model passes
        through them in turn: through five windowed layers and a full one, say.
      dtypes: (name, dtype it is stored in) of every trained array, by its name in the trained tree.
      sharding: the shardings of the arrays on several devices; None: on one.
    """

    model: Model
    sections: tuple[tuple[Span, ...], ...]
    dtypes: tuple[tuple[str, str], ...]
    sharding: Sharding | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of all sections."""
        return tuple(span for section in self.sections for span in section)

    def place_of(self, block: int) -> tuple[Span, int]:
        """Returns the span of a block and its place along the leading axis there."""
        return next((span, span.members.index(block)) for span in self.spans if block in span.members)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A whole model on the device or devices that another one learns from; `params` is laid out as a frozen tree."""

    params: Params
    layout: Layout


def load_teacher(source: ParamSource, model: Model, sharding: Sharding | None = None) -> Teacher:
    """Returns all of a model, compressed or not, in its own dtypes; `sharding` is of that model."""
    _, frozen, layout = split_params(source, model, (), sharding)
    return Teacher(frozen, layout)


def split_params(
    source: ParamSource, model: Model, trainable: Sequence[str], sharding: Sharding | None = None
) -> tuple[Params, Params, Layout]:
    """Returns (trained, frozen, layout), on the device or devices.

    Both trees have the groups "rest" and one per span ("0-29"), below them the paths; what is of a span is stacked
    along a new first axis. `trained` holds masters, float32: codebooks at "<kernel>/codebook" and dense arrays.
    `frozen` holds all other arrays, and every CodebookArray whose codebook trains with None in its place.

    Args:
      source: the whole model; read once, block by block.
      model: the decoder.
      trainable: regular expressions, as in `TrainingConfig`.
      sharding: of several devices.

    Raises:
      InputError: an expression that matches no array, or one that is not floating.
    """
    blocks = (source.load_block(i) for i in range(model.num_blocks))

    def stack(*leaves: Any) -> Any:
        return np.stack([np.asarray(leaf) for leaf in leaves])

    def put(name: str, leaf: Any, dtype: Any) -> Any:
        host = jax.tree.map(lambda array: np.asarray(array, dtype), leaf)
        return jax.tree.map(jnp.asarray, host) if sharding is None else sharding.put(name, host)

    return _split(blocks, source.load_outer(), model, trainable, sharding, stack, put)


def split_shapes(
    blocks: Iterable[Params],
    outer: Params,
    model: Model,
    trainable: Sequence[str],
    sharding: Sharding | None = None,
) -> tuple[Params, Params, Layout]:
    """Returns what `split_params` does, from and as shapes and dtypes: of all blocks in order, and outer parameters."""

    def stack(*leaves: Any) -> Any:
        return _shape_only((len(leaves), *leaves[0].shape), leaves[0].dtype)

    def put(name: str, leaf: Any, dtype: Any) -> Any:
        def one(array: Any, place: Any = None) -> Any:
            return _shape_only(array.shape, dtype or array.dtype, sharding=place)

        return jax.tree.map(one, leaf) if sharding is None else jax.tree.map(one, leaf, sharding.of(name, leaf))

    return _split(blocks, outer, model, trainable, sharding, stack, put)


def _split(
    blocks: Iterable[Params],
    outside: Params,
    model: Model,
    trainable: Sequence[str],
    sharding: Sharding | None,
    stack: Callable[..., Any],
    put: Callable[[str, Any, Any], Any],
) -> tuple[Params, Params, Layout]:
    """Returns both trees and the layout; `stack` joins arrays of a span, `put` places a leaf in a dtype or its own."""
    chosen = _Choice(trainable)
    parts = [chosen.part(f"{model.blocks_path}/{i}/", block) for i, block in enumerate(blocks)]
    outer = chosen.part("", outside)
    chosen.refuse_unused()
    layout = Layout(model, _sections(model, parts), (), sharding)
    trained, frozen, dtypes = {}, {}, {}
    groups = [(span.name, [parts[i] for i in span.members], stack) for span in layout.spans]
    for group, members, joined in [(OUTER, [outer], _alone), *groups]:
        masters, others = (_stacked([member[side] for member in members], joined) for side in (0, 1))
        for path, leaf in masters:
            name = f"{group}/{path}"
            dtypes[name] = np.dtype(leaf.dtype).name
            trained[name] = put(name, leaf, np.float32)
        for path, leaf in others:
            frozen[f"{group}/{path}"] = put(f"{group}/{path}", leaf, None)
    layout = dataclasses.replace(layout, dtypes=tuple(dtypes.items()))
    return trees.unflatten(trained), trees.unflatten(frozen), layout


def _sections(model: Model, parts: Sequence[_Parts]) -> tuple[tuple[Span, ...], ...]:
    """Returns the sections of all blocks, of whose trees `parts` are made: few, so that few programs are compiled."""
    signatures = [(model.layer_type(i), _signature(*part)) for i, part in enumerate(parts)]
    numbers = {signature: number for number, signature in enumerate(dict.fromkeys(signatures))}
    kinds = [numbers[signature] for signature in signatures]
    sections, at = list[tuple[Span, ...]](), 0
    while at < len(kinds):
        period, repeats = _longest_pattern(kinds[at:])
        spans = list[Span]()
        for _, run in itertools.groupby(range(at, at + period), key=kinds.__getitem__):
            members = list(run)
            spans.append(Span(members[0], len(members), signatures[members[0]][0]))
        if len(spans) == 1:
            sections.append((dataclasses.replace(spans[0], count=period * repeats),))
        else:
            sections.append(tuple(dataclasses.replace(span, repeats=repeats, period=period) for span in spans))
        at += period * repeats
    return tuple(sections)


def _longest_pattern(kinds: Sequence[int]) -> tuple[int, int]:
    """Returns (period, repeats) of the beginning that repeats itself and covers most; (1, 1) where none does."""
    found = 1, 1
    for period in range(1, len(kinds) // 2 + 1):
        same = (kind == before for kind, before in zip(kinds[period:], kinds, strict=False))
        repeats = 1 + sum(itertools.takewhile(bool, same)) // period
        if repeats > 1 and period * repeats > math.prod(found):
            found = period, repeats
    return found


def refuse_unmatched(trainable: Sequence[str], names: Iterable[str], what: str = "trainable") -> None:
    """Raises InputError where a regular expression matches none of the names of arrays.

    Args:
      trainable: the expressions, as in `TrainingConfig`.
      names: of all arrays, "<kernel>/codebook" for a compressed kernel.
      what: the expressions' name in the message.
    """
    known = list(names)
    for pattern in sorted(trainable):
        if not any(re.fullmatch(pattern, name) for name in known):
            compressed = any(name.endswith(_CODEBOOK) for name in known)
            advice = "" if compressed else "; this model has no codebooks yet: compress it first"
            raise InputError(
                f"{what} {pattern!r} matches no array of the model; names are paths such as 'model/norm/weight', "
                f"and a kernel's path followed by '/codebook' where the kernel is compressed{advice}"
            )


class _Choice:
    """Which arrays the expressions match."""

    def __init__(self, trainable: Sequence[str]):
        self._trainable = trainable
        self._names = list[str]()

    def part(self, prefix: str, tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns ({name: what trains}, {path: what is frozen}) of one block, or of what is outside the blocks."""
        trained, frozen = {}, {}
        for path, leaf in trees.iterate(tree):
            coded = isinstance(leaf, CodebookArray)
            name = leaf.owner(path) + _CODEBOOK if coded else path
            if not self._matches(prefix + name):
                frozen[path] = leaf
                continue
            values = leaf.codebook if coded else leaf
            if not jnp.issubdtype(values.dtype, jnp.floating):
                raise InputError(f"{prefix + name!r} is {values.dtype}; only floating arrays can train")
            if coded:
                frozen[path] = dataclasses.replace(leaf, codebook=None)
            if not coded or leaf.tied_to is None:
                trained[name] = values
        return trained, frozen

    def _matches(self, name: str) -> bool:
        self._names.append(name)
        return any(re.fullmatch(pattern, name) for pattern in self._trainable)

    def refuse_unused(self) -> None:
        """Raises InputError where an expression has matched no array."""
        refuse_unmatched(self._trainable, self._names)


def _signature(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Hashable:
    """Returns what must be equal in two blocks for one program to serve both."""
    leaves, structure = jax.tree.flatten((dict(trained), dict(frozen)))
    return structure, tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves)


def _stacked(parts: Sequence[dict[str, Any]], stack: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, leaves stacked) and empties the parts, so that nothing is held twice for long."""
    for name in list(parts[0]):
        yield name, jax.tree.map(stack, *(part.pop(name) for part in parts))


def _alone(leaf: Any) -> Any:
    return leaf


def join_group(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    """Returns the parameters of one group, or of one block of a stacked group, as a Model takes them."""
    joined, masters = dict(trees.flatten(frozen)), dict(trees.iterate(trained))
    for path, leaf in joined.items():
        if isinstance(leaf, CodebookArray) and leaf.codebook is None:
            joined[path] = dataclasses.replace(leaf, codebook=masters[leaf.owner(path) + _CODEBOOK])
    # What is left are dense arrays; a codebook's own kernel is always among the frozen.
    return trees.unflatten(joined | {n: v for n, v in masters.items() if n.removesuffix(_CODEBOOK) not in joined})


@partial(jax.jit, static_argnames="layout")
def round_masters(trained: Params, *, layout: Layout) -> Params:
    """Returns the masters moved, still float32, to the numbers that will be stored for them."""
    dtypes = dict(layout.dtypes)

    def rounded(name: str, value: jax.Array) -> jax.Array:
        near = value.astype(dtypes[name]).astype(jnp.float32)
        # As `round_codebook`, matrix by matrix.
        axes = tuple(range(0 if name.startswith(f"{OUTER}/") else 1, value.ndim))
        return jnp.where(keeps_codes(value, near, axes), near, value.astype(jnp.bfloat16).astype(jnp.float32))

    return trees.map_by_path(rounded, trained)


def merge_params(trained: Params, frozen: Params, layout: Layout) -> Iterator[tuple[int | None, Params]]:
    """Yields (block, its tree) in order and then (None, what is outside the blocks), on the host; undoes the split.

    Trained arrays are rounded to the dtype they came in, as `round_codebook` does.
    """
    dtypes = dict(layout.dtypes)
    for i in range(layout.model.num_blocks):
        span, place = layout.place_of(i)
        group = trained.get(span.name, {}), frozen.get(span.name, {})
        block = _fetched(jax.tree.map(lambda leaf, place=place: leaf[place], group))
        yield i, _rounded(block, span.name, dtypes)
    yield None, _rounded(_fetched((trained.get(OUTER, {}), frozen.get(OUTER, {}))), OUTER, dtypes)


def changed_dtypes(tree: Params, block: int | None, layout: Layout) -> list[str]:
    """Returns the full paths of trained arrays whose dtype after rounding is not the one they came in.

    `round_codebook` moves float16 numbers to bfloat16 where float16 does not hold them as well.

    Args:
      tree: as `merge_params` yields it with `block`.
      block: number of the block; None: what is outside the blocks.
      layout: of the model.
    """
    group, prefix = OUTER, ""
    if block is not None:
        group = layout.place_of(block)[0].name
        prefix = f"{layout.model.blocks_path}/{block}/"
    dtypes, changed = dict(layout.dtypes), []
    for path, leaf in trees.iterate(tree):
        coded = isinstance(leaf, CodebookArray)
        before = dtypes.get(f"{group}/{leaf.owner(path) + _CODEBOOK if coded else path}")
        if before is not None and np.dtype(leaf.dtype).name != before:
            changed.append(prefix + path)
    return changed


def _fetched(parts: tuple[Params, Params]) -> tuple[Params, Params]:
    """Returns host arrays; where other processes hold parts of them, all must ask together."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(parts)):
        fetched: tuple[Params, Params] = jax.device_get(parts)
    else:
        fetched = multihost_utils.process_allgather(parts, tiled=True)
    return fetched


def _rounded(parts: tuple[Params, Params], group: str, dtypes: Mapping[str, str]) -> Params:
    trained, frozen = parts
    stored = trees.map_by_path(
        lambda name, value: np.asarray(round_codebook(jnp.asarray(value), dtypes[f"{group}/{name}"])), trained
    )
    return join_group(stored, frozen)
