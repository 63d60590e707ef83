"""Rows of training files that are kept on disk: found again, and only where they would be the same."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
from cli_models import CHARACTERS, write_tokenizer
from tokenizers import AddedToken

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.errors import InputError, RunError
from cluscomp_jax.io.tokenizer import load_tokenizer
from cluscomp_jax.runtime import atomic
from cluscomp_jax.text import token_rows_cache
from cluscomp_jax.text.token_rows_cache import read_cached_examples
from cluscomp_jax.text.training_data import read_examples

VOCAB = 3 + len(CHARACTERS)
SETTINGS = DataConfig(length=24)


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def reads(monkeypatch):
    """The files that were tokenised."""
    found = []

    def reading(spec, *arguments, **options):
        found.append(spec)
        return read_examples(spec, *arguments, **options)

    monkeypatch.setattr(token_rows_cache, "read_examples", reading)
    return found


def write_questions(path):
    lines = [{"question": "what is it?", "answer": answer} for answer in ("a cat", "a dog", "a" * 99)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def assert_same(found, wanted):
    for field in dataclasses.fields(wanted):
        value = getattr(wanted, field.name)
        assert (getattr(found, field.name) is None) == (value is None)
        if value is not None:
            np.testing.assert_array_equal(getattr(found, field.name), value, strict=True)
    assert found.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("form", ["text.txt", "said.jsonl"])
def test_what_is_read_again_is_the_same_and_not_tokenised(tokenizer, tmp_path, reads, form):
    path = tmp_path / form
    if form == "text.txt":
        path.write_text("the cat sat on the mat. " * 9)
        settings = SETTINGS
    else:
        write_questions(path)
        settings = DataConfig(length=90, responses_only=True, too_long="skip")
    wanted = read_examples(path, tokenizer, settings, vocab_size=VOCAB)
    for _ in range(3):
        assert_same(read_cached_examples(tmp_path / "a/b", path, tokenizer, settings, vocab_size=VOCAB), wanted)
    again = path.rename(tmp_path / f"again.{form}")
    assert_same(read_cached_examples(tmp_path / "a/b", again, tokenizer, settings, vocab_size=VOCAB), wanted)
    assert reads == [path]
    assert len(list((tmp_path / "a/b").iterdir())) == 1


def test_whatever_changes_the_rows_is_tokenised_anew(tokenizer, tmp_path, reads):
    path = write_questions(tmp_path / "said.jsonl")
    settings = DataConfig(length=90, too_long="cut")

    def read():
        return read_cached_examples(tmp_path / "cache", path, tokenizer, settings, vocab_size=VOCAB)

    for count, change in enumerate(("nothing", "settings", "template", "tokenizer", "end", "file"), 1):
        if change == "settings":
            settings = dataclasses.replace(settings, length=89)
        elif change == "template":
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        elif change == "tokenizer":
            tokenizer.add_tokens(AddedToken("cat"))
        elif change == "end":
            tokenizer.eos_token = "a"
        elif change == "file":
            path.write_text(path.read_text().replace("dog", "cow"))
        assert_same(read(), read_examples(path, tokenizer, settings, vocab_size=VOCAB))
        assert_same(read(), read())
        assert len(reads) == count, change


@pytest.mark.parametrize("special", ["bos_token", "eos_token"])
def test_a_special_token_that_becomes_another_is_another_tokenizer(tmp_path, reads, special):
    path = write_questions(tmp_path / "said.jsonl")
    found = []
    for token in ("<unk>", "</s>"):
        (folder := tmp_path / token.strip("</>")).mkdir()
        write_tokenizer(folder)
        fields = json.loads((folder / "tokenizer_config.json").read_text()) | {special: token}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = "{{ SPECIAL }}{% for m in messages %}{{ m['content'] }}{% endfor %}".replace(
            "SPECIAL", special
        )
        settings = DataConfig(length=90, too_long="cut")
        found.append(read_cached_examples(tmp_path / "cache", path, tokenizer, settings, vocab_size=VOCAB))
    assert [examples.tokens[0, 0] for examples in found] == [0, 1]
    assert len(reads) == 2


def test_the_same_bytes_under_a_name_of_another_form_are_read_as_that(tokenizer, tmp_path, reads):
    path = write_questions(tmp_path / "said.jsonl")
    for name in ("said.jsonl", "said.jsonl.txt", "said.txt"):
        path = path.rename(tmp_path / name)
        settings = DataConfig(length=90, too_long="cut" if name == "said.jsonl" else "refuse")
        found = read_cached_examples(tmp_path / "cache", path, tokenizer, settings, vocab_size=VOCAB)
        assert (found.lines is None) == (name != "said.jsonl")
    assert len(reads) == 2
    with pytest.raises(InputError, match="give JSON lines"):
        read_cached_examples(
            tmp_path / "cache", path.rename(tmp_path / "said.json"), tokenizer, settings, vocab_size=VOCAB
        )


def test_a_newer_tokenizer_package_tokenises_anew(tokenizer, tmp_path, reads, monkeypatch):
    path = write_questions(tmp_path / "said.jsonl")
    for newer in (False, True):
        if newer:
            monkeypatch.setattr(token_rows_cache, "version", lambda name: "99")
        settings = DataConfig(length=90, too_long="cut")
        read_cached_examples(tmp_path / "cache", path, tokenizer, settings, vocab_size=VOCAB)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(tokenizer, tmp_path, monkeypatch):
    (path := tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)

    def changed_behind(*arguments, **options):
        found = read_examples(*arguments, **options)
        path.write_text("a dog")
        return found

    monkeypatch.setattr(token_rows_cache, "read_examples", changed_behind)
    with pytest.raises(InputError, match=r"text\.txt was changed"):
        read_cached_examples(tmp_path / "cache", path, tokenizer, SETTINGS, vocab_size=VOCAB)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    (path := tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(RunError, match="the disk is full"):
        read_cached_examples(tmp_path / "cache", path, tokenizer, SETTINGS, vocab_size=VOCAB)
    assert not any((tmp_path / "cache").iterdir())


def test_of_several_processes_one_stores(tokenizer, tmp_path):
    (path := tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)
    read_cached_examples(tmp_path / "cache", path, tokenizer, SETTINGS, vocab_size=VOCAB, store=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("part", ["tokens", "scored", "lines", "header"])
def test_a_damaged_file_of_the_cache_is_named(tokenizer, tmp_path, part):
    path, settings = write_questions(tmp_path / "said.jsonl"), DataConfig(length=90, too_long="cut")
    examples = read_cached_examples(tmp_path / "cache", path, tokenizer, settings, vocab_size=VOCAB)
    (kept,) = (tmp_path / "cache").iterdir()
    good = kept.read_bytes()
    at = 3 if part == "header" else good.index(getattr(examples, "loss_mask" if part == "scored" else part).tobytes())
    message = "is damaged" if part == "header" else "are not those that were stored"
    kept.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(InputError, match=f"{kept.name}: .*{message}.*; remove it"):
        read_cached_examples(tmp_path / "cache", path, tokenizer, settings, vocab_size=VOCAB)


def test_a_smaller_vocabulary_is_refused_from_the_cache_too(tokenizer, tmp_path):
    (path := tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)
    for _ in range(2):
        read_cached_examples(tmp_path / "cache", path, tokenizer, SETTINGS, vocab_size=VOCAB)
    with pytest.raises(InputError, match="use the model's tokenizer"):
        read_cached_examples(tmp_path / "cache", path, tokenizer, SETTINGS, vocab_size=9)


def test_arrays_and_missing_files_are_read_as_ever(tokenizer, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(24, dtype=np.int32))
    found = read_cached_examples(tmp_path / "cache", tmp_path / "tokens.npy", None, SETTINGS, vocab_size=VOCAB)
    assert found.tokens.tolist() == [list(range(24))]
    with pytest.raises(InputError, match="nowhere"):
        read_cached_examples(tmp_path / "cache", tmp_path / "nowhere.txt", tokenizer, SETTINGS, vocab_size=VOCAB)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_cache_that_cannot_be_written_to_is_named_before_the_work(tokenizer, tmp_path, reads, below):
    (path := tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)
    with pytest.raises(InputError, match=r"text\.txt is no folder that can be written to; choose another folder"):
        read_cached_examples(path / below, path, tokenizer, SETTINGS, vocab_size=VOCAB)
    assert not reads


def test_a_file_that_is_refused_leaves_no_folder(tokenizer, tmp_path):
    (path := tmp_path / "text.txt").write_text("the cat")
    with pytest.raises(InputError, match="one row takes 24"):
        read_cached_examples(tmp_path / "cache", path, tokenizer, SETTINGS, vocab_size=VOCAB)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_without_contents_is_refused(tmp_path):
    (path := tmp_path / "text.txt").write_text("the cat")
    with pytest.raises(InputError, match=r"leave out the cache \(--token-cache\)"):
        read_cached_examples(tmp_path / "cache", path, object(), SETTINGS, vocab_size=VOCAB)
