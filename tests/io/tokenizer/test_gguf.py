import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_models import hf_tensors, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.open import open_model
from cluscomp_jax.io.tokenizer import encode_text, load_tokenizer, start_tokens
from cluscomp_jax.io.tokenizer.gguf import build_tokenizer

CORPUS = ["the cat and the hat sat in 1984 , the  1985 and 19 thin cats", "naïve café don't — 12,345.67"] * 20
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def train_byte_level(*, digits):
    """A byte-level BPE trained by the tokenizers library; the oracle for what is rebuilt from a header."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def gguf_metadata(backend, *, pre, **changes):
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "general.architecture": "llama",
        "llama.context_length": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    } | changes


SMOLLM, GPT2 = train_byte_level(digits=True), train_byte_level(digits=False)
TEXTS = st.text(alphabet="the cat,and 1984 é—\n'", max_size=60) | st.text(max_size=30)


@settings(max_examples=80)
@given(text=TEXTS, pre=st.sampled_from(["smollm", "gpt-2"]))
def test_a_byte_level_tokenizer_is_rebuilt_from_the_header(text, pre):
    oracle = SMOLLM if pre == "smollm" else GPT2
    rebuilt = REBUILT[pre]
    assert encode_text(rebuilt, text).tolist() == oracle.encode(text).ids
    assert rebuilt.decode(encode_text(rebuilt, text)) == text


REBUILT = {
    "smollm": build_tokenizer(gguf_metadata(SMOLLM, pre="smollm"), where="here"),
    "gpt-2": build_tokenizer(gguf_metadata(GPT2, pre="gpt-2"), where="here"),
}


@pytest.mark.parametrize(("pre", "same"), [("refact", "smollm"), ("dbrx", "llama-bpe"), ("smaug-bpe", "llama-bpe")])
def test_names_for_the_same_split(pre, same):
    """llama.cpp has one case for the names of each pair; only llama-bpe begins texts by itself."""
    one, other = (build_tokenizer(gguf_metadata(SMOLLM, pre=each), where="here") for each in (pre, same))
    sample = "In 1984, it's 12345 o'clock;\n\n  DON'T stop"
    mine, theirs = (encode_text(each, sample) for each in (one, other))
    np.testing.assert_array_equal(mine, theirs[len(theirs) - len(mine) :])
    assert len(theirs) - len(mine) == (same == "llama-bpe")


def test_digits_are_split_one_by_one_for_smollm():
    pieces = REBUILT["smollm"].convert_ids_to_tokens(encode_text(REBUILT["smollm"], "in  1984"))
    assert pieces[-4:] == ["1", "9", "8", "4"]
    assert all(
        len(piece) == 1 for piece in REBUILT["smollm"].convert_ids_to_tokens(encode_text(REBUILT["smollm"], "1984"))
    )
    assert any("1" in piece and len(piece) > 1 for piece in REBUILT["gpt-2"].tokenize(" 1984"))


def test_special_tokens_and_template_are_carried():
    tokenizer = REBUILT["smollm"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert encode_text(tokenizer, "a<|im_start|>b").tolist()[1] == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, []),
        ({"tokenizer.ggml.add_bos_token": True}, [1]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1]),
        ({"tokenizer.ggml.add_eos_token": True}, []),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [1]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, []),
    ],
)
def test_a_text_is_led_by_the_start_tokens_alone(changes, start):
    tokenizer = build_tokenizer(gguf_metadata(SMOLLM, pre="smollm", **changes), where="here")
    ids = encode_text(tokenizer, "the cat")
    assert start_tokens(tokenizer) == start
    assert ids.dtype == np.int32
    assert ids[: len(start)].tolist() == start
    assert tokenizer.decode(ids[len(start) :]) == "the cat"
    assert encode_text(tokenizer, "").tolist() == start


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "abc 12345", ["abc", " ", "123", "45"]),
        ("qwen2", "abc 123", ["abc", " ", "1", "2", "3"]),
        ("tekken", "abCd 12", ["ab", "Cd", " ", "1", "2"]),
        ("deepseek-r1-qwen", "don't 9", ["don", "'t", " ", "9"]),
        ("default", "don't a==1234", ["don", "'", "t", " a", "==", "123", "4"]),
    ],
)
def test_texts_are_split_as_the_models_own_tokenizers_do(pre, text, pieces):
    backend = build_tokenizer(gguf_metadata(SMOLLM, pre=pre), where="here").backend_tokenizer
    split = [piece.replace("Ġ", " ") for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert split == pieces


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c"]
MERGED = ["ab", "▁a", "▁ab", "bc", "abc", "▁abc", "aa", "▁▁"]
SENTENCEPIECE = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES + MERGED,
    "tokenizer.ggml.scores": [0.0] * 259 + [-100.0] * 4 + [-float(rank) for rank in range(len(MERGED))],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (4 + len(MERGED)),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def merge_by_score(text):
    """SentencePiece's BPE by its definition: join the neighbours whose whole scores best, leftmost first."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES + MERGED)}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        scores = [
            (SENTENCEPIECE["tokenizer.ggml.scores"][vocabulary[a + b]], -i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in vocabulary
        ]
        if not scores:
            break
        i = -max(scores)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for piece in pieces:
        known = vocabulary.get(piece)
        ids += [known] if known is not None else [vocabulary[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids


@settings(max_examples=150)
@given(st.text(alphabet="aabbc d é", max_size=24))
def test_a_sentencepiece_tokenizer_is_rebuilt_from_its_scores(text):
    tokenizer = build_tokenizer(SENTENCEPIECE, where="here")
    assert encode_text(tokenizer, text).tolist() == [1, *merge_by_score(text)]
    assert tokenizer.decode(encode_text(tokenizer, text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokenizer.ggml.model": None}, "describes no tokenizer"),
        ({"tokenizer.ggml.tokens": []}, "describes no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' of the GGUF file"),
        ({"tokenizer.ggml.pre": "never-heard-of"}, "'never-heard-of'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre None"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id is 1000000, the vocabulary has"),
        ({"tokenizer.ggml.merges": ["ab"]}, "holds 'ab'"),
        ({"tokenizer.ggml.merges": ["th zzzz"]}, "merges"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b"]}, "lists 3 tokens of which 2"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type lists 1 types for"),
    ],
)
def test_a_header_that_cannot_be_served_is_refused_in_one_line(changes, expected):
    metadata = gguf_metadata(SMOLLM, pre="smollm")
    if len(changes.get("tokenizer.ggml.tokens", "long enough")) == 3:
        metadata |= dict.fromkeys(("tokenizer.ggml.token_type", "tokenizer.ggml.merges"))
    with pytest.raises(InputError, match=expected) as caught:
        build_tokenizer(metadata | changes, where="here.gguf")
    assert str(caught.value).startswith("here.gguf: ")
    assert "\n" not in str(caught.value)


def test_scores_must_be_one_per_piece():
    with pytest.raises(InputError, match="scores"):
        build_tokenizer(SENTENCEPIECE | {"tokenizer.ggml.scores": [0.0]}, where="here")


def test_a_gguf_file_gives_the_tokenizer_of_its_header(tmp_path):
    def metadata(writer):
        header = gguf_metadata(SMOLLM, pre="smollm")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(header["tokenizer.ggml.tokens"])
        writer.add_token_types(header["tokenizer.ggml.token_type"])
        writer.add_token_merges(header["tokenizer.ggml.merges"])
        writer.add_bos_token_id(1)

    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=metadata)
    for tokenizer in (load_tokenizer(path), open_model(path).load_tokenizer()):
        assert encode_text(tokenizer, CORPUS[0]).tolist() == SMOLLM.encode(CORPUS[0]).ids


@pytest.mark.parametrize("folder", [".", "tokenizer"])
def test_a_saved_tokenizer_comes_back_from_a_folder_or_a_checkpoint(tmp_path, folder):
    REBUILT["smollm"].save_pretrained(tmp_path / folder)
    again = load_tokenizer(tmp_path)
    assert encode_text(again, CORPUS[0]).tolist() == SMOLLM.encode(CORPUS[0]).ids
    assert again.chat_template == TEMPLATE
    assert again.eos_token == "<|im_end|>"


def test_start_tokens_of_a_saved_template_are_put_once(tmp_path):
    tokenizer = build_tokenizer(
        gguf_metadata(SMOLLM, pre="smollm", **{"tokenizer.ggml.add_bos_token": True}), where="here"
    )
    tokenizer.save_pretrained(tmp_path)
    text = CORPUS[0] * 50
    assert encode_text(load_tokenizer(tmp_path), text).tolist() == [1, *SMOLLM.encode(text).ids]


def test_a_text_longer_than_the_context_is_encoded_whole_and_in_silence(tmp_path, capfd):
    tokenizer = REBUILT["smollm"]
    assert tokenizer.model_max_length == 16
    assert len(encode_text(tokenizer, CORPUS[0] * 100)) > 1000
    backend = Tokenizer.from_str(SMOLLM.to_str())
    backend.enable_truncation(4)
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4}'
    )
    assert len(encode_text(load_tokenizer(tmp_path), CORPUS[0] * 100)) > 1000
    assert capfd.readouterr().err == ""


def test_loading_says_nothing_of_pytorch(tmp_path):
    REBUILT["smollm"].save_pretrained(tmp_path)
    code = "import sys; from cluscomp_jax.io.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no tokenizer could be loaded"),
        ({"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'}, "never run"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "tokenizer.json: cannot be read"),
        ({"tokenizer.json": "no json", "tokenizer_config.json": "{}"}, "tokenizer.json: cannot be read"),
        ({"tokenizer_config.json": "no json"}, "tokenizer"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
