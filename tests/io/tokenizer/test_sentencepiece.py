"""tokenizer.model alone is read as the library sentencepiece reads it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from cluscomp_jax import data
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer import load_tokenizer, tokenizer_digest, write_tokenizer

TEXTS = (
    data.text("wiki_test")[100_000:104_000],
    " Été  –\t東京 🙂\n\n x",
    "a",
    "",
)


def trained(**options: Any) -> bytes:
    """Returns a SentencePiece model of 600 pieces, with Llama's settings where none are given."""
    settings = {
        "model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "control_symbols": ["[IMG]"], "minloglevel": 2,
    } | options  # fmt: skip
    model = io.BytesIO()
    lines = iter(data.text("wiki_test")[:100_000].splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    return model.getvalue()


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"pad_id": 3, "vocab_size": 500}])
def test_tokens_are_those_of_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    theirs, ours = sentencepiece.SentencePieceProcessor(), load_tokenizer(tmp_path)
    theirs.load(str(tmp_path / "tokenizer.model"))
    assert len(ours) == theirs.get_piece_size()
    for text in TEXTS:
        expected = theirs.encode(text)
        assert ours(text, add_special_tokens=False)["input_ids"] == expected
        assert ours(text)["input_ids"] == [theirs.bos_id(), *expected]
        assert ours.decode(expected) == theirs.decode(expected).replace("\u2047", "<unk>")
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert ours.pad_token_id == options.get("pad_id")


def test_files_next_to_it_add_tokens_roles_and_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 600}')
    decoder = {"601": {"content": "<|call|>"}, "1": {"content": "<s>"}}
    fields = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    read = load_tokenizer(tmp_path)
    assert read("<|im_end|><|call|>")["input_ids"] == [600, 601]
    assert (read.eos_token, read.chat_template) == ("<|im_end|>", "x")
    (tmp_path / "written").mkdir()
    write_tokenizer(read, tmp_path / "written")
    assert tokenizer_digest(load_tokenizer(tmp_path / "written")) == tokenizer_digest(read)


BPE = trained()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
        (BPE[:-5], "no SentencePiece model"),
        (BPE[: len(BPE) // 2], "no "),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "no SentencePiece model"),
        (trained(model_type="unigram"), "no BPE"),
        (trained(normalization_rule_name="nmt_nfkc"), "rewrites texts"),
        (trained(remove_extra_whitespaces=True), "rewrites texts"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        load_tokenizer(tmp_path)
    assert "fetch tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)
