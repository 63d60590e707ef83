"""Where the leaves of a tree lie on devices: arrays as a sharding says, a CodebookArray as that of its kernel does."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from cluscomp_jax.core import pytrees
from cluscomp_jax.core.codebook import CodebookArray, splits
from cluscomp_jax.core.sharded_kernel import spec
from cluscomp_jax.errors import InputError

_LOG = logging.getLogger(__name__)


def shardings_by_path(paths: Iterable[str], sharding: Any) -> dict[str, Any]:
    """Returns {path: what `sharding` says of the leaf there}: a Sharding, a CodebookArray of two, or None.

    Args:
      paths: of the leaves.
      sharding: one Sharding, a function path -> Sharding, or a pytree of them with the tree's paths; None.

    Raises:
      InputError: it says nothing of a path, or something that is no Sharding.
    """
    if sharding is None or isinstance(sharding, Sharding):
        return dict.fromkeys(paths, sharding)
    if callable(sharding):
        return {path: _checked(path, sharding(path)) for path in paths}
    leaves = dict(pytrees.iterate(sharding))
    return {path: _checked(path, _said(leaves, path)) for path in paths}


def _said(leaves: Mapping[str, Any], path: str) -> Any:
    if path not in leaves:
        raise InputError(f"sharding has no {path!r}; give a tree of the same paths")
    return leaves[path]


def _checked(path: str, found: Any) -> Any:
    parts = (found.codebook, found.index) if isinstance(found, CodebookArray) else (found,)
    if found is not None and not all(isinstance(part, Sharding) for part in parts):
        raise InputError(f"sharding of {path} is a {type(found).__name__}, no jax.sharding.Sharding")
    return found


def codebook_shardings(w: CodebookArray, sharding: Sharding, path: str = "CodebookArray") -> CodebookArray:
    """Returns the CodebookArray with shardings in place of its arrays, from the sharding of the host's array.

    The index is split as the kernel is along stacked axes and along each side of its matrices, the latter where every
    device then has the same number of whole vectors. Where that is not so, the log says it, and the side is whole on
    every device. The codebook is split along stacked axes alone.

    Args:
      w: arrays or ShapeDtypeStructs.
      sharding: of an array of the shape of `w`.
      path: names the array in messages.

    Raises:
      InputError: a sharding that is split and is no NamedSharding, or has more axes than the array.
    """
    if not isinstance(sharding, NamedSharding):
        if not sharding.is_fully_replicated:
            raise InputError(f"{path}: a {type(sharding).__name__} does not name axes; give a NamedSharding")
        return dataclasses.replace(w, codebook=sharding, index=sharding)
    _check_rank(path, w.ndim, sharding)
    found = splits(w, sharding.mesh.shape)
    index, codebook = found.of_index(tuple(sharding.spec)), found.of_codebook(tuple(sharding.spec))
    if len(_names(index)) < len(_names(sharding.spec)):
        _LOG.info("%s: the index is split over %s, of the kernel's %s", path, index, tuple(sharding.spec))
    made = [NamedSharding(sharding.mesh, spec(*axes), memory_kind=sharding.memory_kind) for axes in (codebook, index)]
    return dataclasses.replace(w, codebook=made[0], index=made[1])


def place(path: str, leaf: Any, sharding: Any) -> Any:
    """Returns a leaf of host arrays where `sharding` says, as `shardings_by_path` gives it; None: on the host.

    Raises:
      InputError: the sharding does not fit the array, or the devices have no such dtype.
    """
    if sharding is None:
        return leaf
    if not isinstance(leaf, CodebookArray):
        return _put(path, leaf, sharding)
    if not isinstance(sharding, CodebookArray):
        sharding = codebook_shardings(leaf, sharding, path)
    codebook = _put(f"{path}/codebook", leaf.codebook, sharding.codebook)
    return dataclasses.replace(leaf, codebook=codebook, index=_put(f"{path}/index", leaf.index, sharding.index))


def _check_rank(path: str, ndim: int, sharding: Any) -> None:
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > ndim:
        raise InputError(f"{path} has {ndim} axes, its sharding {sharding.spec}")


def _names(spec: Any) -> list[str]:
    return [name for entry in spec for name in ((entry,) if isinstance(entry, str) else tuple(entry or ()))]


def _put(path: str, array: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    if isinstance(sharding, CodebookArray):
        raise InputError(f"{path} is a dense array; its sharding is that of a CodebookArray")
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype != array.dtype:
        raise InputError(f"{path} is {array.dtype}, on a device {dtype}; set jax_enable_x64, or leave it on the host")
    _check_rank(path, array.ndim, sharding)
    try:
        sharding.shard_shape(array.shape)
    except ValueError as error:
        raise InputError(f"{path}, {array.shape}, does not fit its sharding: {' '.join(str(error).split())}") from error
    return jax.make_array_from_callback(array.shape, sharding, lambda part: np.asarray(array[part]))
