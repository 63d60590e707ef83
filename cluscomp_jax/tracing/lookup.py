"""A lookup of whole rows, as in an embedding, of a TracedKernel: only the rows asked for are decoded.

Letters: n codes of g weights; a row is a row or a column of the matrix, whichever the program looks up.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.tracing.kernel import TracedKernel


def look_up(kernel: TracedKernel, ids: Any, params: Any) -> jax.Array | None:
    """Returns the rows [..., size of the other axis] of a `gather`, in the kernel's dtype; None where it is another.

    Args:
      kernel: the operand.
      ids: integers [..., 1], the numbers of the rows.
      params: of the equation.
    """
    payload, ids = kernel.payload, jnp.asarray(ids)
    if not isinstance(payload, CodebookArray) or not _is_lookup(kernel, ids, params):
        return None
    count, rows = kernel.shape[0], ids[..., 0].astype(jnp.int32)
    inside = jnp.clip(rows, 0, count - 1)
    found = _rows(payload, inside, kernel.dims[0][0].side == "in").astype(kernel.dtype)
    if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = jnp.asarray(jnp.nan if params["fill_value"] is None else params["fill_value"], found.dtype)
        found = jnp.where((rows == inside)[..., None], found, fill)
    return found


def _is_lookup(kernel: TracedKernel, ids: jax.Array, params: Any) -> bool:
    numbers, sides = params["dimension_numbers"], [[atom.side for atom in dim] for dim in kernel.dims]
    return (
        sides in ([["in"], ["out"]], [["out"], ["in"]])
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == (ids.ndim - 1,)
        and tuple(params["slice_sizes"]) == (1, kernel.shape[1])
    )


def _rows(w: CodebookArray, rows: jax.Array, of_inputs: bool) -> jax.Array:
    """Returns W[rows] where the rows are `of_inputs`, else W[:, rows] with its axes swapped; [*rows.shape, size]."""
    codebook, index = jnp.asarray(w.codebook), jnp.asarray(w.index)
    size = w.matrix_shape[1 if of_inputs else 0]
    if of_inputs == (w.axis == "out"):  # a row is a line of the index
        lines, flat = (index if of_inputs else index.T), rows.reshape(-1)
        taken = lines[flat] if of_inputs else lines[flat].T
        shape = (flat.size, size) if of_inputs else (size, flat.size)
        matrix = w.coding.decode(dataclasses.replace(w.form, matrix_shape=shape), codebook, taken)
        return (matrix if of_inputs else matrix.T).reshape(*rows.shape, size)
    codes = w.coding.codes(w.form, index)
    codes = codes if of_inputs else codes.T
    within = (rows % w.group_size)[..., None]  # a row is one weight of each code
    return codebook[codes[rows // w.group_size].astype(jnp.int32), within]
