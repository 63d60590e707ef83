import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.checkpoint.entries import MatrixEntry, TensorEntry, decode, encode, stored_arrays
from cluscomp_jax.clustering.matrix import matrix_size
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError


@st.composite
def matrices(draw):
    d_in, d_out, g = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 32))
    n = draw(st.sampled_from([1, 2, 3, 255, 256, 257, 1000, 65535, 65536]))
    axis = draw(st.sampled_from(["out", "in"]))
    dtype = draw(st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (d_in, -(-d_out // g)) if axis == "out" else (-(-d_in // g), d_out)
    index = rng.integers(0, n, shape).astype(np.uint8 if n <= 256 else np.uint16)
    return CodebookArray(rng.standard_normal((n, g)).astype(dtype), index, (d_in, d_out), axis)


@given(matrices())
@settings(max_examples=60)
def test_a_matrix_comes_back_and_its_entry_says_what_is_stored(w):
    entry, arrays = encode("a/kernel", w)
    assert {p: (a.shape, a.dtype) for p, a in arrays.items()} == stored_arrays("a/kernel", entry)
    back = decode("a/kernel", entry, arrays)
    assert (back.shape, back.axis) == (w.shape, w.axis)
    assert (back.index.dtype, back.codebook.dtype) == (w.index.dtype, w.codebook.dtype)
    np.testing.assert_array_equal(back.index, w.index)
    assert back.codebook.tobytes() == w.codebook.tobytes()
    if w.codebook.dtype.itemsize == 2:
        assert entry.to_dict()["bits_per_weight"] == matrix_size("w", w).bits_per_weight


def test_float32_codes_count_with_32_bits():
    w = CodebookArray(np.zeros((2, 4), np.float32), np.zeros((3, 2), np.uint8), (3, 8))
    assert encode("w", w)[0].to_dict()["bits_per_weight"] == (1 * 6 + 32 * 8) / 24


def test_one_code_needs_no_index():
    w = CodebookArray(np.zeros((1, 4), np.float16), np.zeros((3, 2), np.uint8), (3, 8))
    entry, arrays = encode("w", w)
    assert list(arrays) == ["w/codebook"]
    assert entry == MatrixEntry((3, 8), "out", 4, 1, "float16")


def test_a_dense_array_is_stored_as_it_is():
    array = np.arange(3, dtype=np.float16)
    assert encode("w", array) == (TensorEntry((3,), "float16"), {"w": array})
    assert decode("w", TensorEntry((3,), "float16"), {"w": array}) is array


@pytest.mark.parametrize("dtype", ["float64", "int8", "complex64", "object"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match=f"w: dtype {dtype} cannot be stored"):
        encode("w", np.ones(2, dtype))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="index names code 2"):
        encode("w", CodebookArray(np.zeros((2, 4), np.float16), np.full((3, 2), 2, np.uint8), (3, 8)))
