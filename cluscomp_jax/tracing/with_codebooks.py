"""with_codebooks: a function of dense arrays made one that takes CodebookArrays in their places.

Works on any function that JAX can trace, of whatever framework. Knows the jaxpr, not the framework.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from cluscomp_jax.core import pytrees
from cluscomp_jax.core.caller_mesh import explicit_mesh
from cluscomp_jax.core.codebook import CodebookArray, decoded_split
from cluscomp_jax.core.sharded_kernel import spec
from cluscomp_jax.tracing.evaluate import dense_each, evaluate
from cluscomp_jax.tracing.kernel import TracedKernel


def with_codebooks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, whose arguments may now hold CodebookArrays where it expects arrays.

    The function is traced with dense arrays of their shapes and dtypes, so it runs unmodified, whatever it is written
    with. Its products x @ W are then computed from codebook and index (`linear`), those inside `lax.scan`,
    `jit` and `jax.checkpoint` too. Where it does anything else with a kernel, that kernel is decoded first;
    `count_products` counts both. The result differs from that of decoded kernels by rounding only. It is differentiable
    in codebooks, in reverse mode, and is to be jitted as a whole: without `jax.jit` every call traces the function
    anew. A product of 16-bit numbers is rounded to 16 bit before it becomes float32, where the host asks for that.

    Args:
      function: of pytrees. Arrays and keys in its arguments are traced; other leaves, such as a number, a flag or a
        name, are constants. It must not have side effects. CodebookArrays that it closes over are decoded.

    Raises:
      TypeError: a result that is neither an array nor a number.
    """

    @functools.wraps(function)
    def served(*args: Any, **kwargs: Any) -> Any:
        out_structure: list[Any] = []

        def flat(args: Any, kwargs: Any) -> list[Any]:
            outs, out_tree = jax.tree.flatten(function(*args, **kwargs))
            out_structure.append(out_tree)
            return outs

        of_arrays, arrays = pytrees.by_arrays(flat, (args, kwargs), _is_traced)
        closed = jax.make_jaxpr(of_arrays)(*map(_abstract, arrays))
        values = [TracedKernel.of(leaf) if isinstance(leaf, CodebookArray) else leaf for leaf in arrays]
        outs, _ = evaluate(closed.jaxpr, closed.consts, values)
        return jax.tree.unflatten(out_structure[-1], dense_each(outs, closed.jaxpr.outvars))

    return served


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, CodebookArray | jax.Array | np.ndarray)


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, CodebookArray):
        mesh = explicit_mesh(leaf)
        sharding = None if mesh is None else NamedSharding(mesh, spec(*decoded_split(leaf)))
        return pytrees.shape_struct(leaf.shape, leaf.dtype, sharding)
    return leaf
