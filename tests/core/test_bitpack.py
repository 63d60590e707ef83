import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.core import bitpack
from cluscomp_jax.core.bitpack import pack, packed_bytes, unpack
from cluscomp_jax.errors import InputError


def oracle(values, bits):
    """The stream as one Python integer."""
    stream = sum(value << (k * bits) for k, value in enumerate(values))
    return stream.to_bytes(-(-len(values) * bits // 8), "little")


@st.composite
def indices(draw):
    bits = draw(st.integers(0, 16))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(indices())
@settings(max_examples=200)
def test_packed_bytes_are_those_of_the_stream_and_come_back(case):
    bits, values = case
    index = np.array(values, np.uint8 if bits <= 8 else np.uint16)
    packed = pack(index, bits)
    assert packed.tobytes() == oracle(values, bits)
    back = unpack(packed, bits, len(values))
    assert back.dtype == index.dtype
    np.testing.assert_array_equal(back, index)


@pytest.mark.parametrize("bits", range(17))
def test_the_seams_between_steps_do_not_show(bits, monkeypatch):
    monkeypatch.setattr(bitpack, "_GROUPS_PER_STEP", 3)
    values = np.random.default_rng(bits).integers(0, 2**bits, 1001).tolist()
    packed = pack(np.array(values, np.uint16), bits)
    assert packed.tobytes() == oracle(values, bits)
    assert unpack(packed, bits, 1001).tolist() == values


def test_a_matrix_is_packed_in_c_order_whatever_its_layout_in_memory():
    index = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(pack(np.asfortranarray(index), 4), pack(index.reshape(-1), 4))


def test_whole_bytes_and_words_are_stored_as_they_are():
    index = np.array([1, 0x203, 0xFFFF], np.uint16)
    assert pack(index, 16).tobytes() == index.astype("<u2").tobytes()
    assert pack(np.array([7, 255], np.uint8), 8).tobytes() == bytes([7, 255])


def test_a_long_index_over_the_seam_of_the_real_step():
    index = np.random.default_rng(0).integers(0, 1000, (1 << 20) + 13).astype(np.uint16)
    packed = pack(index, 10)
    assert packed.size == packed_bytes(index.size, 10)
    np.testing.assert_array_equal(unpack(packed, 10, index.size), index)


@pytest.mark.parametrize(("values", "bits"), [([4], 2), ([1], 0), ([-1], 4)])
def test_a_value_that_does_not_fit_is_refused(values, bits):
    with pytest.raises(InputError, match="bits hold 0 to"):
        pack(np.array(values), bits)


@pytest.mark.parametrize("bits", [-1, 17])
def test_other_widths_are_refused(bits):
    with pytest.raises(InputError, match="0 to 16"):
        pack(np.zeros(1, np.uint8), bits)
    with pytest.raises(InputError, match="0 to 16"):
        unpack(np.zeros(1, np.uint8), bits, 1)


@pytest.mark.parametrize("packed", [np.zeros(3, np.uint8), np.zeros(5, np.uint8), np.zeros(4, np.int8)])
def test_bytes_of_another_length_or_type_are_refused(packed):
    with pytest.raises(InputError, match=r"uint8 \[4\]"):
        unpack(packed, 10, 3)
