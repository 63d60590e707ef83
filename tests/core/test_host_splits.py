"""A split of a kernel and the split of its index that follows: every device has the same weights by either."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from random_trees import codebook_arrays

from cluscomp_jax.core.codebook import CodebookArray, splits
from cluscomp_jax.core.host_axes import HostAxes

PARTS = 2


def matrices(w):
    """The places of the weights in the host, as its matrices [*stack, d_in, d_out] have them."""
    places = np.arange(w.size).reshape(w.shape)
    at = 0 if w.host is None else w.host.stack_at
    front = np.moveaxis(places, range(at, at + len(w.stack)), range(len(w.stack)))
    if w.host is None:
        return front
    order = [*range(len(w.stack)), *(len(w.stack) + axis for axis in w.host.order)]
    return front.transpose(order).reshape(*w.stack, *w.matrix_shape)


def index_axes(w):
    """The axes of the index: "stack 0", …, "in", "out"."""
    at = 0 if w.host is None else w.host.stack_at
    sides = ["in", "out"]
    return [*sides[:at], *(f"stack {k}" for k in range(len(w.stack))), *sides[at:]]


def halves_by_index(w, name):
    """The places that the first and the second half of an axis of the index decode to; vectors are whole."""
    whole = matrices(w)
    axis = {"in": -2, "out": -1}[name] if name in ("in", "out") else int(name.split()[1])
    return [set(half.reshape(-1)) for half in np.split(whole, PARTS, axis)]


@given(codebook_arrays(), st.data())
def test_an_index_is_split_as_its_kernel_or_not_at_all(w, data):
    axis = data.draw(st.integers(0, w.ndim - 1))
    assume(w.shape[axis] % PARTS == 0)
    spec = [None] * w.ndim
    spec[axis] = "x"
    found = splits(w, {"x": PARTS}).of_index(spec)
    assert len(found) == w.index.ndim
    assert len(splits(w, {"x": PARTS}).of_codebook(spec)) == w.codebook.ndim
    for k, entry in enumerate(found):
        if entry is not None:
            assert w.index.shape[k] % PARTS == 0
            places = np.arange(w.size).reshape(w.shape)
            by_host = [set(half.reshape(-1)) for half in np.split(places, PARTS, axis)]
            assert halves_by_index(w, index_axes(w)[k]) == by_host
            assert splits(w, {"x": PARTS}).of_host(found) == tuple(spec)


@given(codebook_arrays(), st.data())
def test_a_decoded_array_is_split_as_its_index_or_not_at_all(w, data):
    axis = data.draw(st.integers(0, w.index.ndim - 1))
    assume(w.index.shape[axis] % PARTS == 0)
    spec = [None] * w.index.ndim
    spec[axis] = "x"
    for k, entry in enumerate(splits(w, {"x": PARTS}).of_host(spec)):
        if entry is not None:
            assert w.shape[k] % PARTS == 0
            places = np.arange(w.size).reshape(w.shape)
            by_host = [set(half.reshape(-1)) for half in np.split(places, PARTS, k)]
            assert halves_by_index(w, index_axes(w)[axis]) == by_host


@pytest.mark.parametrize(
    ("spec", "index", "codebook"),
    [
        ((None, "y"), (None, None, "y"), (None, None, None)),
        (("x", "l", ("y", "z")), ("x", "l", ("y", "z")), (None, "l", None)),
        (("x", None, None, "y"), ("x", None, None), (None, None, None)),
    ],
)
def test_heads_are_split_and_their_parts_are_not(spec, index, codebook):
    host = HostAxes((8, 4, 4), (0, 1, 2), 1, stack_at=1)
    w = CodebookArray(np.ones((5, 2, 2), np.float16), np.zeros((8, 2, 8), np.uint8), (8, 16), "out", None, host)
    spec = (spec[0], None, *spec[1:]) if len(spec) == 2 else spec
    found = splits(w, {"x": 2, "y": 2, "z": 2, "l": 2})
    assert found.of_index(spec) == index
    assert found.of_codebook(spec) == codebook
