import gzip
import sys
from types import SimpleNamespace

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.errors import InputError
from cluscomp_jax.text import text


class Letters:
    """A tokenizer of one token per character: its code point."""

    def __call__(self, words, **_):
        return {"input_ids": [ord(letter) for letter in words]}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
def test_a_file_is_read_as_it_is(tmp_path, name):
    words = " = Title = \r\n\n naïve 東京 \n"
    raw = words.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    assert text.read_text(tmp_path / name) == words
    np.testing.assert_array_equal(text.load_tokens(tmp_path / name, Letters()), [ord(c) for c in words])


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("words", encoding="utf-8-sig")
    (tmp_path / "s.txt").write_text("12\n", encoding="utf-8-sig")
    assert text.read_text(tmp_path / "a.txt") == "words"
    assert text.read_starts(tmp_path / "s.txt").tolist() == [12]


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t ", "holds no text"),
        ("a.txt", b"ab\xff", r"byte 2 is 0xff"),
        ("a.txt.gz", b"plain", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"words" * 1000, mtime=0)[:-9], "cannot be read"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "holds no text"),
    ],
)
def test_a_bad_text_file_is_refused(tmp_path, name, raw, expected):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=expected):
        text.read_text(tmp_path / name)


def test_an_unknown_text_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(InputError, match="neither a file nor one of the data sets wikitext2, c4, ptb"):
        text.read_text(tmp_path / "absent.txt")


class Rows(dict):
    def __len__(self):
        return len(self["text"])

    def select(self, rows):
        return Rows(text=[self["text"][i] for i in rows])


def test_named_data_sets_are_joined_in_their_way(monkeypatch):
    asked = []

    def load_dataset(repository, name, **options):
        asked.append((repository, name, options["split"], options["data_files"]))
        return Rows(text=[f"line {i}" for i in range(3000)])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    wiki = text.read_text("wikitext2", split="train")
    c4 = text.read_text("c4", split="test")
    assert wiki == "\n\n".join(f"line {i}" for i in range(3000))
    assert c4 == " ".join(f"line {i}" for i in range(2000))
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None),
        ("allenai/c4", None, "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
    ]


def test_a_data_set_that_cannot_be_had_is_refused_in_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match="'ptb' cannot be loaded: no route to host"):
        text.read_text("ptb")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"'ptb' needs datasets, .* pip install \"cluscomp-jax\[hf\]\""):
        text.read_text("ptb")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_token_arrays_are_taken_as_they_are(tmp_path, dtype):
    np.save(tmp_path / "t.npy", np.arange(50, dtype=dtype))
    tokens = text.load_tokens(tmp_path / "t.npy", None, vocab_size=50)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, np.arange(50))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones(4, np.float32), r"float32 \[4\]"),
        (np.ones((2, 2), np.int32), r"int32 \[2, 2\]"),
        (np.array([1, -1]), "from -1 to 1"),
        (np.array([2**40]), "1099511627776"),
        (np.array([3, 50]), "token id 50, the vocabulary has 50"),
        (np.array([{}]), "damaged, or no array of token ids"),
    ],
)
def test_a_bad_token_array_is_refused(tmp_path, array, expected):
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=expected):
        text.load_tokens(tmp_path / "t.npy", None, vocab_size=50)


def test_an_archive_of_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "t.npz", a=np.arange(3))
    (tmp_path / "t.npz").rename(tmp_path / "t.npy")
    with pytest.raises(InputError, match="an archive of several arrays"):
        text.load_tokens(tmp_path / "t.npy", None)


@pytest.mark.parametrize("raw", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_token_array_is_refused(tmp_path, raw):
    (tmp_path / "t.npy").write_bytes(raw)
    with pytest.raises(InputError, match="damaged, or no array of token ids"):
        text.load_tokens(tmp_path / "t.npy", None)
    with pytest.raises(InputError, match="does not exist"):
        text.load_tokens(tmp_path / "absent.npy", None)


def test_a_token_outside_the_vocabulary_is_refused_with_both_values(tmp_path):
    (tmp_path / "a.txt").write_text("az")
    with pytest.raises(InputError, match="token id 122, the vocabulary has 100"):
        text.load_tokens(tmp_path / "a.txt", Letters(), vocab_size=100)


@settings(max_examples=100)
@given(total=st.integers(2, 300), length=st.integers(2, 300), samples=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_samples_are_crops_of_the_text_and_follow_the_seed(total, length, samples, seed):
    tokens = np.arange(total, dtype=np.int32)
    if length > total:
        with pytest.raises(InputError, match=f"has {total} tokens, one sample needs {length}"):
            text.calibration_samples(tokens, samples=samples, length=length, seed=seed)
        return
    crops = text.calibration_samples(tokens, samples=samples, length=length, seed=seed)
    chex.assert_shape(crops, (samples, length))
    assert crops.dtype == np.int32
    assert (np.diff(crops, axis=1) == 1).all()
    assert crops.min() >= 0
    assert crops.max() < total
    np.testing.assert_array_equal(crops, text.calibration_samples(tokens, samples=samples, length=length, seed=seed))


def test_first_and_last_start_are_both_drawn():
    crops = text.calibration_samples(np.arange(12), samples=200, length=10, seed=0)
    assert set(crops[:, 0].tolist()) == {0, 1, 2}


def test_given_starts_are_taken_in_order(tmp_path):
    (tmp_path / "starts.txt").write_text("7\n0\n\n 90 \n3\n")
    sample_offsets = text.read_starts(tmp_path / "starts.txt")
    crops = text.calibration_samples(np.arange(100), samples=3, length=10, seed=5, sample_offsets=sample_offsets)
    np.testing.assert_array_equal(crops[:, 0], [7, 0, 90])
    np.testing.assert_array_equal(crops[2], np.arange(90, 100))


@pytest.mark.parametrize(
    ("samples", "length", "sample_offsets", "expected"),
    [
        (3, 10, [0, 1], "2 start positions for 3 samples"),
        (2, 10, [0, 91], r"start position 91 is outside 0 … 90 \(100 tokens"),
        (1, 10, [-1], "start position -1 is outside"),
        (0, 10, None, "samples >= 1"),
        (1, 1, None, "length >= 2"),
        (1, 101, None, "100 tokens, one sample needs 101"),
    ],
)
def test_samples_that_do_not_fit_are_refused_with_both_values(samples, length, sample_offsets, expected):
    given_starts = None if sample_offsets is None else np.array(sample_offsets)
    with pytest.raises(InputError, match=expected):
        text.calibration_samples(np.arange(100), samples=samples, length=length, seed=0, sample_offsets=given_starts)


def test_starts_out_of_range_but_unused_do_not_matter():
    crops = text.calibration_samples(np.arange(100), samples=1, length=10, seed=0, sample_offsets=np.array([5, 1000]))
    np.testing.assert_array_equal(crops, [np.arange(5, 15)])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1\n2.5\n", "line 2: '2.5'"),
        ("-3\n", "line 1: '-3'"),
        ("9" * 30, "line 1: '9999"),
        ("\n\n", "holds no positions"),
        ("a b", "line 1"),
    ],
)
def test_a_bad_starts_file_is_refused_by_line(tmp_path, content, expected):
    (tmp_path / "starts.txt").write_text(content)
    with pytest.raises(InputError, match=expected):
        text.read_starts(tmp_path / "starts.txt")
    with pytest.raises(InputError, match="cannot be read"):
        text.read_starts(tmp_path / "absent.txt")


@settings(max_examples=40)
@given(length=st.integers(4, 60), context=st.integers(2, 9), with_begin=st.booleans())
def test_windows_begin_with_the_token_and_hold_the_text_in_order(length, context, with_begin):
    if length < context:
        return
    tokens = np.arange(1, length + 1)
    windows = text.begin_windows(np.concatenate([[0], tokens]) if with_begin else tokens, 0, context)
    rows = windows.reshape(-1, context)
    assert windows.dtype == np.int32
    assert (rows[:, 0] == 0).all()
    np.testing.assert_array_equal(rows[:, 1:].reshape(-1), tokens[: len(rows) * (context - 1)])
    assert len(tokens) - len(rows) * (context - 1) < context - 1 or context == 2


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="3 tokens, a window of 5 takes 4"):
        text.begin_windows(np.arange(1, 4), 0, 5)
    with pytest.raises(InputError, match="context is 1"):
        text.begin_windows(np.arange(1, 4), 0, 1)


def test_samples_begin_with_the_token():
    tokens = np.arange(10, 110)
    plain, begun = (text.calibration_samples(tokens, samples=5, length=7, seed=1, begin=b) for b in (None, 3))
    assert (begun[:, 0] == 3).all()
    np.testing.assert_array_equal(begun[:, 1:], plain[:, 1:])
