"""GGUF headers that count too much, written byte by byte, and those of real models."""

import struct
import time
import tracemalloc

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_models import hf_tensors, write_gguf

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.gguf.header import check_counts
from cluscomp_jax.io.gguf.source import GgufSource, read_metadata


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(tensors=0, keys=1):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def array(kind, count, key=b"a"):
    return text(key) + struct.pack("<IIQ", 9, kind, count)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header() + array(0, 20_000_000) + bytes(20_000_000), "arrays of 20,000,000 elements up to 'a'"),
        (header() + array(0, 2**62), "4,611,686,018,427,387,904 elements"),
        (header() + array(8, 5_000_000) + bytes(8 * 5_000_000), "arrays of 5,000,000 elements"),
        (header(keys=2) + array(0, 10**6) + bytes(10**6) + array(0, 2_500_000, b"b"), "3,500,000 elements up to 'b'"),
        (header() + array(9, 10**6) + struct.pack("<IQ", 0, 0) * 10**6, "arrays of arrays in 'a'"),
        (header(keys=300_000) + (text(b"a") + struct.pack("<II", 4, 1)) * 300_000, "counts 300,000 keys"),
        (header(tensors=2**40, keys=0), "counts 1,099,511,627,776 tensors"),
        (header() + text(b"a") + struct.pack("<II", 13, 1), "a value of type 13"),
    ],
)
def test_a_header_that_counts_too_much_is_refused_at_once(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            read_metadata(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert time.monotonic() - began < 5
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", header(), header() + array(8, 3) + text(b"x"), b"PK\3\4" * 20])
def test_what_ends_too_soon_or_is_another_file_is_left_to_the_library(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    check_counts(path)
    with pytest.raises(InputError, match="not a whole GGUF file"):
        read_metadata(path)


def test_a_vocabulary_of_the_largest_models_is_read(tmp_path):
    tokens = 262_144

    def metadata(writer):
        writer.add_token_list([f"t{i}" for i in range(tokens)])
        writer.add_token_scores([0.0] * tokens)
        writer.add_token_types([1] * tokens)

    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=metadata)
    check_counts(path)
    source = GgufSource(write_gguf(tmp_path / "small.gguf", hf_tensors(), metadata=lambda w: w.add_token_list(["a"])))
    assert source.metadata["tokenizer.ggml.tokens"] == ["a"]


@settings(max_examples=60)
@given(st.lists(st.one_of(st.integers(0, 2**31), st.text(max_size=9), st.booleans(), st.lists(st.text(max_size=3)))))
def test_an_array_behind_any_other_keys_is_found(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for i, value in enumerate(values):
        add = {bool: writer.add_bool, int: writer.add_uint64, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"key.{i}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    whole = path.read_bytes()
    check_counts(path)
    (keys,) = struct.unpack_from("<Q", whole, 16)
    path.write_bytes(whole[:16] + struct.pack("<Q", keys + 1) + whole[24:] + array(4, 10**7, b"last"))
    with pytest.raises(InputError, match="up to 'last', which has 10,000,000"):
        check_counts(path)
