"""CodebookArrays of any rank, stack, axes and dtype, their numbers drawn at random."""

import math
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import PLAIN, Form, TrellisCoding
from cluscomp_jax.core.host_axes import HostAxes

FLOATS = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float16", "bfloat16", "float32")}


@st.composite
def codebook_arrays(draw: Any) -> CodebookArray:
    """Draws one; half of them have a host, two thirds are stacked."""
    hosted = draw(st.booleans())
    num_in, num_out = (draw(st.integers(1, 2)) if hosted else 1 for _ in range(2))
    sizes = tuple(draw(st.integers(1, 6)) for _ in range(num_in + num_out))
    order = tuple(draw(st.permutations(range(len(sizes))))) if hosted else (0, 1)
    stack = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    at = draw(st.integers(0, 2)) if hosted else 0
    dtype = draw(st.sampled_from([None, "float32", "bfloat16", "float16"]))
    host = HostAxes(sizes, order, num_in, at, dtype) if hosted else None
    shape = host.matrix_shape if host is not None else sizes
    g, axis = draw(st.integers(1, 5)), draw(st.sampled_from(["out", "in"]))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    window = draw(st.integers(1, 9))
    coding = draw(st.sampled_from([PLAIN, TrellisCoding(draw(st.integers(1, window)))]))
    n = draw(st.integers(1, 300)) if coding == PLAIN else 1 << window
    form = Form(shape, n, g, axis)
    pieces, dtype_of_index = coding.index_spec(form)

    def stacked(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:at], *stack, *shape[at:])

    codebook = random.standard_normal(math.prod(stacked((n, g)))).reshape(stacked((n, g)))
    index = random.integers(0, n if coding == PLAIN else 2**32, stacked(pieces)).astype(dtype_of_index)
    if coding != PLAIN:  # a stream has no bits after its end
        cut, last = 0 if axis == "in" else 1, [slice(None)] * index.ndim
        last[cut + len(stack) if cut >= at else cut] = slice(-1, None)
        used = coding.index_bits(form) // form.lines % 32
        index[tuple(last)] &= np.uint32(2**used - 1 if used else 2**32 - 1)
    codebook = codebook.astype(FLOATS[draw(st.sampled_from(list(FLOATS)))])
    return CodebookArray(codebook, index, shape, axis, None, host, coding)


def same(found: Any, expected: Any) -> bool:
    """Whether two leaves have the same bytes, shapes, dtypes and static fields."""
    if isinstance(expected, CodebookArray):
        static = ("matrix_shape", "axis", "tied_to", "host")
        parts = [(found.codebook, expected.codebook), (found.index, expected.index)]
        return all(getattr(found, name) == getattr(expected, name) for name in static) and all(
            same(one, other) for one, other in parts
        )
    one, other = np.asarray(found), np.asarray(expected)
    return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())
