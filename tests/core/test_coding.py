"""Codings against their definitions in Python's integers; the numbers that they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.core.codebook import CodebookArray, decode, validate
from cluscomp_jax.core.coding import PLAIN, Form, TrellisCoding, coding_of, stored_bits
from cluscomp_jax.core.linear import linear
from cluscomp_jax.errors import InputError


@st.composite
def trellises(draw: st.DrawFn) -> tuple[Form, TrellisCoding, np.ndarray]:
    """Draws (form, coding, codes [lines, vectors]) of one random stream for each line."""
    window = draw(st.integers(1, 16))
    coding = TrellisCoding(draw(st.integers(1, window)))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    form = Form(shape, 1 << window, draw(st.integers(1, 4)), draw(st.sampled_from(["out", "in"])))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    codes = np.empty((form.lines, form.vectors), np.int64)
    codes[:, 0] = random.integers(0, form.num_codes, form.lines)
    for j in range(1, form.vectors):
        added = random.integers(0, 1 << coding.step_bits, form.lines)
        codes[:, j] = (codes[:, j - 1] >> coding.step_bits) | (added << (window - coding.step_bits))
    return form, coding, codes


def streams(form: Form, coding: TrellisCoding, codes: np.ndarray) -> list[int]:
    """The stream of every line as one integer, its first bit the least significant."""
    window, found = form.num_codes.bit_length() - 1, []
    for line in codes.tolist():
        stream = line[0]
        for j, code in enumerate(line[1:]):
            stream |= (code >> (window - coding.step_bits)) << (window + j * coding.step_bits)
        found.append(stream)
    return found


@settings(max_examples=60, deadline=None)
@given(trellises())
def test_the_index_is_the_stream_and_its_windows_are_the_codes(drawn: tuple[Form, TrellisCoding, np.ndarray]) -> None:
    form, coding, codes = drawn
    turned = codes if form.axis == "out" else codes.T
    index = np.asarray(coding.index_of(form, jnp.asarray(turned, jnp.int32)))
    assert (index.shape, index.dtype) == coding.index_spec(form)
    lines = index if form.axis == "out" else index.T
    expected = streams(form, coding, codes)
    assert [sum(int(word) << (32 * k) for k, word in enumerate(line)) for line in lines] == expected
    np.testing.assert_array_equal(coding.codes(form, index), turned)

    bits = coding.index_bits(form) // form.lines
    assert bits == form.num_codes.bit_length() - 1 + (form.vectors - 1) * coding.step_bits
    packed = coding.pack(form, np.stack([index, index]))
    whole = sum(stream << (bits * k) for k, stream in enumerate(expected * 2))
    assert packed.tobytes() == whole.to_bytes(-(-2 * form.lines * bits // 8), "little")
    np.testing.assert_array_equal(coding.unpack(form, packed, 2), np.stack([index, index]))


@settings(max_examples=30, deadline=None)
@given(trellises(), st.integers(0, 99))
def test_decode_and_products_are_those_of_the_codes(drawn: tuple[Form, TrellisCoding, np.ndarray], seed: int) -> None:
    form, coding, codes = drawn
    d_in, d_out = form.matrix_shape
    random = np.random.default_rng(seed)
    codebook = random.standard_normal((form.num_codes, form.group_size)).astype(np.float32)
    turned = codes if form.axis == "out" else codes.T
    index = coding.index_of(form, jnp.asarray(turned, jnp.int32))
    w = validate(CodebookArray(codebook, index, form.matrix_shape, form.axis, coding=coding))
    dense = codebook[codes].reshape(form.lines, -1)
    dense = dense[:, :d_out] if form.axis == "out" else dense[:, :d_in].T
    np.testing.assert_array_equal(decode(w), dense)
    x = random.standard_normal((3, d_in)).astype(np.float32)
    np.testing.assert_allclose(linear(jnp.asarray(x), w), x @ dense, rtol=1e-4, atol=1e-4)


def test_many_lines_are_packed_in_steps() -> None:
    """More lines than one step of packing takes, of a number of bits that ends within a byte."""
    form, coding = Form((70_001, 6), 32, 2), TrellisCoding(3)
    codes = np.zeros((70_001, 3), np.int64)
    random = np.random.default_rng(0)
    codes[:, 0] = random.integers(0, 32, 70_001)
    for j in (1, 2):
        codes[:, j] = (codes[:, j - 1] >> 3) | (random.integers(0, 8, 70_001) << 2)
    index = np.asarray(coding.index_of(form, jnp.asarray(codes, jnp.int32)))
    packed = coding.pack(form, index)
    whole = sum(s << (11 * k) for k, s in enumerate(streams(form, coding, codes[:40])))
    assert packed[:55].tobytes() == whole.to_bytes(55, "little")
    np.testing.assert_array_equal(coding.unpack(form, packed, 1)[0], index)


def test_stored_bits_count_everything() -> None:
    form = Form((576, 1536), 1024, 2)
    assert stored_bits(form, TrellisCoding(4)) == 576 * (6 + 768 * 4) + 16 * 2 * 1024
    assert stored_bits(form, TrellisCoding(4), own=False) == 576 * (6 + 768 * 4)
    assert stored_bits(form) == 576 * 768 * 10 + 16 * 2 * 1024


@pytest.mark.parametrize(
    ("n", "g", "bits", "message"),
    [
        (1000, 2, 4, "a trellis has 1000 codes; they must be a power of two, 2 to 65536"),
        (2**17, 2, 4, "they must be a power of two, 2 to 65536"),
        (1, 2, 1, "a trellis has 1 codes"),
        (1024, 33, 4, "codes of 33 weights; they must be 1 to 32"),
        (1024, 2, 11, r"step_bits is 11; windows of 10 bits \(1024 codes\) take 1 to 10"),
        (1024, 2, 0, "step_bits is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(n: int, g: int, bits: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrellisCoding(bits).check(Form((8, 64), n, g), "W")


def test_a_stream_that_is_short_or_has_spare_bits_is_refused() -> None:
    form, coding = Form((4, 12), 64, 2), TrellisCoding(3)  # 6 + 5 * 3 = 21 bits a line
    codebook = np.zeros((64, 2), np.float16)
    good = np.zeros((4, 1), np.uint32)
    validate(CodebookArray(codebook, good, (4, 12), coding=coding))
    for bad, message in (
        (good[:, :0], r"index has shape \(4, 0\)"),
        (good.astype(np.uint16), "index is uint16; 64 codes need uint32"),
        (good + np.uint32(1 << 21), "a stream has bits after its end of 21 bits"),
    ):
        with pytest.raises(InputError, match=message):
            validate(CodebookArray(codebook, bad, (4, 12), coding=coding), "W")
    packed = coding.pack(form, good)
    with pytest.raises(InputError, match=r"uint8 \[10\]; 4 streams of 21 bits are uint8 \[11\]"):
        coding.unpack(form, packed[:-1], 1)
    packed[-1] |= 0x80
    with pytest.raises(InputError, match="bits after its 4 streams of 21 bits"):
        coding.unpack(form, packed, 1)


def test_a_coding_is_found_by_its_name_and_numbers() -> None:
    assert coding_of("plain", {}, "W") == PLAIN
    assert coding_of("trellis", {"step_bits": 3}, "W") == TrellisCoding(3)
    for name, numbers, message in (
        ("wavelet", {}, "coding is 'wavelet'; it must be one of plain, trellis"),
        ("trellis", {}, "takes step_bits; found {}"),
        ("trellis", {"step_bits": "3"}, "takes step_bits"),
        ("plain", {"step_bits": 3}, "takes no numbers"),
    ):
        with pytest.raises(InputError, match=message):
            coding_of(name, numbers, "W")  # type: ignore[arg-type]
