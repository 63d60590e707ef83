"""Codebooks as trainable parameters of any pytree: what `jax.grad`, optax, TrainState and nnx.Optimizer take.

`jax.grad` takes floating arrays alone, and an optimizer needs float32: in float16 Adam's epsilon is 0. So a tree is
parted into float32 masters, which train, and the rest; `combine` joins them, and `rounded` stores the result in 16 bit.
Knows no loss and no optimizer.
"""

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import pytrees
from cluscomp_jax.core.codebook import CodebookArray, round_codebook
from cluscomp_jax.errors import InputError


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Trained:
    """Where the frozen tree has no array because it trains; a pytree without leaves.

    Attributes:
      dtype: name of the dtype that the array came in.
    """

    dtype: str


CODEBOOKS = (".*/codebook", "codebook")
"""What `partition` trains unless told otherwise: every codebook."""


def partition(tree: Any, trainable: Sequence[str] = CODEBOOKS) -> tuple[Any, Any]:
    """Returns (trainable, frozen), two trees of the structure of `tree`; `combine` joins them.

    In `trainable` what trains is float32 and all else is None. A codebook that several kernels have is there once.

    Args:
      tree: any pytree whose leaves are arrays and CodebookArrays, dense or compressed.
      trainable: regular expressions of what trains, matched against the whole path; that of a codebook is its
        kernel's path followed by "/codebook". (".*",) trains every floating array.

    Raises:
      InputError: an expression matches no floating array, or a codebook's owner is not in the tree.
    """
    patterns = _compiled(trainable)
    used: set[str] = set()
    paths = {path for path, _ in pytrees.iterate(tree)}

    def trains(path: str, array: Any) -> bool:
        if array is None or not jnp.issubdtype(getattr(array, "dtype", np.bool_), jnp.floating):
            return False
        matching = {text for text, pattern in patterns.items() if pattern.fullmatch(path)}
        used.update(matching)
        return bool(matching)

    def part(path: str, leaf: Any) -> tuple[Any, Any]:
        if not isinstance(leaf, CodebookArray):
            if not trains(path, leaf):
                return None, leaf
            return _master(leaf), Trained(np.dtype(leaf.dtype).name)
        owner = pytrees.owner_path(path, leaf.tied_to, paths)
        if not trains(f"{owner}/codebook", leaf.codebook):
            return dataclasses.replace(leaf, codebook=None, index=None), leaf
        master = _master(leaf.codebook) if owner == path else None
        mark = Trained(np.dtype(leaf.codebook.dtype).name)
        return dataclasses.replace(leaf, codebook=master, index=None), dataclasses.replace(leaf, codebook=mark)

    parts = {path: part(path, leaf) for path, leaf in pytrees.iterate(tree)}
    if tuple(trainable) == CODEBOOKS and not used:
        raise InputError("the tree has no codebooks to train; cluster it first, or say what trains: trainable=('.*',)")
    for text in sorted(patterns.keys() - used - set(CODEBOOKS)):
        raise InputError(
            f"trainable {text!r} matches no floating array of the tree; the path of a codebook is its kernel's and "
            "'/codebook'"
        )
    return (
        pytrees.map_by_path(lambda path, _: parts[path][0], tree),
        pytrees.map_by_path(lambda path, _: parts[path][1], tree),
    )


def combine(trainable: Any, frozen: Any) -> Any:
    """Returns the tree that `partition` parted: codebooks float32, other trained arrays in the dtype they came in."""
    masters = dict(pytrees.iterate(trainable))
    leaves = pytrees.iterate(frozen, _is_frozen_leaf)
    paths = {path for path, _ in leaves}
    if not any(isinstance(getattr(leaf, "codebook", leaf), Trained) for _, leaf in leaves):
        raise InputError("frozen marks nothing that trains; give combine(trainable, frozen) as partition returned them")
    if masters.keys() - paths:
        raise InputError(f"trainable has {sorted(masters.keys() - paths)[0]!r}, frozen has not: they are of two trees")

    def join(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Trained):
            return masters[path].astype(leaf.dtype)
        if isinstance(leaf, CodebookArray) and isinstance(leaf.codebook, Trained):
            return dataclasses.replace(leaf, codebook=masters[pytrees.owner_path(path, leaf.tied_to, paths)].codebook)
        return leaf

    return pytrees.map_by_path(join, frozen, _is_frozen_leaf)


def rounded(tree: Any, dtype: Any = "float16") -> Any:
    """Returns the tree with its codebooks in 16 bit: `dtype`, or bfloat16 where that keeps one better."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, CodebookArray):
            return leaf
        return dataclasses.replace(leaf, codebook=round_codebook(jnp.asarray(leaf.codebook), dtype))

    return jax.tree.map(one, tree, is_leaf=pytrees.is_codebook_array)


def _compiled(trainable: Sequence[str]) -> dict[str, re.Pattern[str]]:
    if isinstance(trainable, str):
        raise InputError(f"trainable is {trainable!r}; give a list of expressions, [{trainable!r}]")
    found = {}
    for text in trainable:
        try:
            found[text] = re.compile(text)
        except re.error as error:
            raise InputError(f"trainable {text!r} is not a regular expression: {error}") from error
    return found


def _master(array: Any) -> jax.Array:
    return jnp.asarray(array).astype(jnp.float32)


def _is_frozen_leaf(leaf: Any) -> bool:
    return isinstance(leaf, CodebookArray | Trained)
