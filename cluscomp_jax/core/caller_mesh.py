"""Work that does not depend on the mesh of the caller's arrays, or on the mesh that the caller has set.

In a mesh with Explicit axes (the default of `jax.make_mesh`) the type of every array contains its sharding, and each
operation must know the sharding of its result. A gather of codes, a reshape or a product over a split axis does not. So
compression runs on one device without a mesh, and functions of arrays on a mesh run with Auto axes inside.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_spec: Any = PartitionSpec


def on_one_device(array: Any) -> Any:
    """Returns the array; one on several devices, whole or in parts, as a NumPy array of the host."""
    traced = isinstance(array, jax.core.Tracer)
    if isinstance(array, jax.Array) and not traced and len(array.sharding.device_set) > 1:
        return np.asarray(array)
    return array


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
    """Programs traced inside have no mesh: one that the caller has set would fix the devices of every array."""
    none: Any = None
    with jax.set_mesh(none):
        yield


def explicit_mesh(*trees: Any) -> Any:
    """Returns the mesh with an Explicit axis of an array of the trees, by its type; None if there is none."""
    for leaf in jax.tree.leaves(trees):
        mesh = getattr(_sharding(leaf), "mesh", None)
        if mesh is not None and AxisType.Explicit in (mesh.axis_types or ()):
            return mesh
    return None


def _sharding(array: Any) -> Any:
    """Returns the sharding of an array by its type; None for what is no array of JAX, an nnx.Param for example."""
    return getattr(jax.typeof(array), "sharding", None) if isinstance(array, jax.Array) else None


def spec_of(array: Any, axis: int) -> Any:
    """Returns what an axis of the array is split over by its type: a mesh axis, several, or None."""
    spec = getattr(_sharding(array), "spec", ())
    axis = axis % array.ndim
    return spec[axis] if axis < len(spec) else None


def split_of_type(aval: Any) -> tuple[Any, ...]:
    """Returns what each axis of an array of a type is split over: a mesh axis, several, or None."""
    spec = tuple(getattr(getattr(aval, "sharding", None), "spec", None) or ())
    return (*spec, *(None,) * (len(aval.shape) - len(spec)))


def partitioned(function: Callable[..., jax.Array], arguments: tuple[Any, ...], out: tuple[Any, ...]) -> jax.Array:
    """Returns function(*arguments), its axes Auto inside where those of the arguments' mesh are Explicit.

    Args:
      function: of pytrees of arrays.
      arguments: on one mesh, on none, or on the host.
      out: what each axis of the result is to be split over; an axis of the mesh that comes twice counts the first time.
    """
    mesh = explicit_mesh(*arguments)
    if mesh is None:
        return function(*arguments)
    seen: set[str] = set()
    entries: list[Any] = []
    for entry in out:
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        entries.append(None if seen & set(names) else entry)
        seen |= set(names)
    result: jax.Array = jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, _spec(*entries)))(*arguments)
    return result
