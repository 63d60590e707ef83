"""A folder's tokenizer is what its tokenizer.json says, whatever class and model type the folder names."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cluscomp_jax import data
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.hub import transformers
from cluscomp_jax.io.tokenizer import load_tokenizer, stop_tokens, tokenizer_digest, write_tokenizer

TEXT = "Hello,  world! 1234567 x=3.14 été e\u0301te\u0301  don't\n\tnew 東京 🙂<|end|> <tool>ok</tool>"
CLASSES = (
    "LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast",
    "GPT2Tokenizer", "TokenizersBackend", None,
)  # fmt: skip
TYPES = ("llama", "mistral", "qwen2", "qwen3")
REPLACED = ("qwen2",)
"""Model types whose tokenizer some releases of AutoTokenizer replace, whatever class is named."""


def byte_level(split: str = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+") -> Tokenizer:
    """A BPE of 900 tokens whose digits come in threes, which no class of transformers has by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in ("<|begin|>", "<|end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([data.text("wiki_test")[:100_000]], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


@pytest.fixture(scope="module")
def described() -> Tokenizer:
    return byte_level()


def write(folder: Path, tokenizer: Tokenizer, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}} | fields
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def ids(tokenizer: object, text: str = TEXT) -> list[int]:
    return list(tokenizer(text)["input_ids"])  # type: ignore[operator]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_original_written_and_reloaded_are_what_tokenizer_json_says(
    tmp_path: Path, described: Tokenizer, name: str | None, model_type: str
) -> None:
    fields = {"add_bos_token": True} | ({} if name is None else {"tokenizer_class": name})
    original = write(tmp_path / "original", described, **fields)
    config = json.dumps({"model_type": model_type, "vocab_size": 901})
    (original / "config.json").write_text(config)
    (tmp_path / "written").mkdir()
    ours = load_tokenizer(original)
    write_tokenizer(ours, tmp_path / "written")
    again = load_tokenizer(tmp_path / "written")
    expected = described.encode(TEXT).ids
    (tmp_path / "written" / "config.json").write_text(config)
    plain = transformers().PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "written"))
    for tokenizer in (ours, again, plain):
        assert ids(tokenizer) == expected
        assert tokenizer.decode(expected) == described.decode(expected, skip_special_tokens=False)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    if model_type not in REPLACED:
        assert ids(transformers().AutoTokenizer.from_pretrained(str(tmp_path / "written"))) == expected
    assert tokenizer_digest(again) == tokenizer_digest(ours)


def test_a_digest_tells_tokenizers_apart(tmp_path: Path, described: Tokenizer) -> None:
    digest = tokenizer_digest(load_tokenizer(write(tmp_path / "a", described)))
    assert tokenizer_digest(load_tokenizer(write(tmp_path / "b", described, model_max_length=12))) == digest
    digits = Tokenizer.from_str(described.to_str())
    digits.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    longer = Tokenizer.from_str(described.to_str())
    longer.add_tokens(["<more>"])
    silent = Tokenizer.from_str(described.to_str())
    silent.post_processor = processors.ByteLevel(trim_offsets=False)
    others = [tokenizer_digest(load_tokenizer(write(tmp_path / "c", other))) for other in (digits, longer, silent)]
    assert len({digest, *others}) == 4


def test_truncation_and_padding_of_the_file_do_not_cut_a_text(tmp_path: Path, described: Tokenizer) -> None:
    cutting = Tokenizer.from_str(described.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64)
    assert ids(load_tokenizer(write(tmp_path / "a", cutting))) == described.encode(TEXT).ids


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("where", ["config", "named", "jinja", "json"])
def test_the_chat_template_is_found_and_carried_along(tmp_path: Path, described: Tokenizer, where: str) -> None:
    inside = {
        "config": TEMPLATE,
        "named": [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "x"}],
    }
    fields = {"chat_template": inside[where]} if where in inside else {"chat_template": "another"}
    folder = write(tmp_path / "a", described, **fields)
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    elif where == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (tmp_path / "b").mkdir()
    write_tokenizer(load_tokenizer(folder), tmp_path / "b")
    for read in (load_tokenizer(folder), load_tokenizer(tmp_path / "b")):
        assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_roles_that_no_token_has(tmp_path: Path, described: Tokenizer) -> None:
    assert load_tokenizer(write(tmp_path / "a", described, pad_token="<pad>", unk_token=None)).pad_token is None
    with pytest.raises(InputError, match=r"tokenizer_config.json: eos_token is '</s>', which is no token"):
        load_tokenizer(write(tmp_path / "b", described, eos_token="</s>"))


@pytest.mark.parametrize("template", [{"a": 1}, 7, [1], [{"name": "x"}]])
def test_a_template_that_is_none_is_refused_in_one_line(tmp_path: Path, described: Tokenizer, template: object) -> None:
    with pytest.raises(InputError, match="chat_template") as caught:
        load_tokenizer(write(tmp_path / "a", described, chat_template=template))
    assert "\n" not in str(caught.value)


def test_a_turn_ends_at_every_token_known_to_end_one(tmp_path: Path, described: Tokenizer) -> None:
    chat = Tokenizer.from_str(described.to_str())
    chat.add_special_tokens(["<|eot_id|>", "<|im_end|>"])
    chat.add_tokens(["<|end|>"])  # a word here, no special token
    read = load_tokenizer(write(tmp_path / "a", chat))
    ends = {chat.token_to_id(token) for token in ("<|end|>", "<|eot_id|>", "<|im_end|>")}
    config = SimpleNamespace(eos_token_id=(7,))
    assert set(stop_tokens(config, read)) == {7} | ends  # <|end|> is this tokenizer's end token
    assert stop_tokens(object(), load_tokenizer(write(tmp_path / "b", described))) == (
        described.token_to_id("<|end|>"),
    )


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(InputError, match=f"{name}: is a pointer of Git LFS"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
