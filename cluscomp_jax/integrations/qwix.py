"""ClusterProvider: clustered parameters in the unmodified modules of linen and nnx, by way of qwix.

qwix replaces JAX's products, and the functions by which Flax reads a parameter, while a model runs. So this works where
a program cannot be handed over as a function of its parameters. Where it can, `with_codebooks` needs no library and
serves more. Knows no model. Needs the extra `qwix`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen.dtypes
import flax.nnx.nn.dtypes
import jax
import jax.numpy as jnp

from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import HostAxes
from cluscomp_jax.runtime.extras import needed_for
from cluscomp_jax.tracing.with_codebooks import with_codebooks

with needed_for("ClusterProvider", "qwix"):
    import qwix

_PRODUCTS: dict[str, Callable[..., Any]] = {
    "jax.lax.dot_general": jax.lax.dot_general,
    "jax.numpy.einsum": jnp.einsum,
    "jax.numpy.dot": jnp.dot,
    "jax.numpy.matmul": jnp.matmul,
    "jax.numpy.tensordot": jnp.tensordot,
}
"""What a model multiplies with, by the name that qwix replaces."""


class ClusterProvider(qwix.QuantizationProvider):  # type: ignore[misc]
    """What `qwix.quantize_model` takes so that a model runs with CodebookArrays as parameters.

    `model = qwix.quantize_model(model, ClusterProvider())`, for nnx with an example of the inputs in addition. The
    parameters of linen are clustered before or after; those of nnx, which are in the model, before.

    The products of the model by a CodebookArray are computed from codebook and index wherever they are x @ W.
    `count_products` counts them, and those whose kernel is decoded in a product. A kernel that the model does anything
    else with, such as slicing, is decoded there and not counted.
    """

    def __init__(self) -> None:
        super().__init__([])

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Returns the functions that stand in for others while the model runs, by the names of those."""
        products = {name: functools.partial(_multiply, function) for name, function in _PRODUCTS.items()}
        readers = {
            "jax.numpy.asarray": _asarray,
            "jax.numpy.astype": _astype,
            "flax.linen.Module.param": _linen_param,
            "flax.linen.dtypes.promote_dtype": _promote_linen,
            "flax.nnx.nn.dtypes.promote_dtype": _promote_nnx,
        }
        return {**super().get_intercept_map(), **products, **readers}


def _multiply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args = tuple(_unboxed(arg) for arg in args)
    if any(isinstance(arg, CodebookArray) for arg in args):
        return with_codebooks(function)(*args, **kwargs)
    return function(*args, **kwargs)


def _unboxed(value: Any) -> Any:
    """Returns the CodebookArray in a box of linen or a variable of nnx, anything else as it is."""
    if isinstance(value, flax.linen.meta.AxisMetadata):
        inside = value.unbox()
    elif isinstance(value, flax.nnx.Variable):
        inside = value.get_value()
    else:
        return value
    return inside if isinstance(inside, CodebookArray) else value


def _asarray(a: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    unboxed = _unboxed(a)
    return _cast(unboxed, dtype) if isinstance(unboxed, CodebookArray) else jnp.asarray(a, dtype, *args, **kwargs)


def _astype(x: Any, dtype: Any, /, **kwargs: Any) -> Any:
    unboxed = _unboxed(x)
    return _cast(unboxed, dtype) if isinstance(unboxed, CodebookArray) else jnp.astype(x, dtype, **kwargs)


def _cast(w: CodebookArray, dtype: Any) -> Any:
    """Returns the kernel in another floating dtype, its codes as they are; the decoded array in any other dtype."""
    if dtype is None or jnp.dtype(dtype) == jnp.dtype(w.dtype):
        return w
    if not jnp.issubdtype(dtype, jnp.floating):
        return w.astype(dtype)
    host = w.host or HostAxes(w.matrix_shape, (0, 1), 1)
    return dataclasses.replace(w, host=dataclasses.replace(host, dtype=jnp.dtype(dtype).name))


def _linen_param(module: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Returns the CodebookArray of that name; linen's own function compares the shapes of its leaves and refuses it."""
    found = _unboxed(module.get_variable("params", name))
    return found if isinstance(found, CodebookArray) else module.param(name, *args, **kwargs)


def _promote_linen(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    return list(_promoted(args, dtype, inexact))


def _promote_nnx(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> tuple[Any, ...]:
    return _promoted(tuple(args), dtype, inexact)


def _promoted(args: tuple[Any, ...], dtype: Any, inexact: bool) -> tuple[Any, ...]:
    """Returns the arguments in their common dtype, as Flax does, CodebookArrays left as such."""
    args = tuple(_unboxed(arg) for arg in args)
    shapes = (jnp.zeros((), arg.dtype) if isinstance(arg, CodebookArray) else arg for arg in args)
    common = flax.linen.dtypes.canonicalize_dtype(*shapes, dtype=dtype, inexact=inexact)
    return tuple(None if arg is None else _asarray(arg, common) for arg in args)
