"""The published vocabularies of Llama 3 and Mistral: the same tokens by every way a file can come."""

import base64
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from io_models import hf_tensors, write_gguf

from cluscomp_jax import data
from cluscomp_jax.io.open import open_model
from cluscomp_jax.io.tokenizer import load_tokenizer, tokenizer_digest, write_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
TEXT = data.text("wiki_test")[:20_000] + " Été – 東京 🙂\t\n\n  don't DON'T 1234567"


PACKAGES = Path(sys.prefix) / "vocabularies"
"""Where `make parity` installs the packages of the vocabularies, apart from all others."""


def package(name: str) -> Path:
    if not (PACKAGES / name).is_dir():
        pytest.skip(f"{name} is not in {PACKAGES}")
    return PACKAGES / name


def by_all_ways(gguf_file: Path, folder: Path) -> list[Any]:
    """The tokenizer of a GGUF file, and of the folders that it is written into, twice."""
    first = open_model(gguf_file).load_tokenizer()
    read = [first]
    for name in ("once", "twice"):
        (folder / name).mkdir()
        write_tokenizer(read[-1], folder / name)
        read.append(load_tokenizer(folder / name))
    assert len({tokenizer_digest(tokenizer) for tokenizer in read}) == 1
    return read


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in BYTES} | {
    byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in BYTES)
}
"""GPT-2's printable letter of each byte."""


def letters(piece: bytes) -> str:
    return "".join(LETTERS[byte] for byte in piece)


def merge_of(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The last merge that makes a piece, by joining its bytes by the lowest rank; more than two where none does."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        joined = [rank if rank < ranks[piece] else len(ranks) for rank in joined]
        if min(joined) == len(ranks):
            break
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_llama_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken")
    file = package("llama_models") / "llama3" / "tokenizer.model"
    monkeypatch.syspath_prepend(PACKAGES)
    oracle = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer(file)
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    special = sorted(oracle.special_tokens, key=oracle.special_tokens.get)
    tokens = [*(letters(piece) for piece in ranks), *special]
    made = (merge_of(piece, ranks) for piece in ranks if len(piece) > 1)
    merges = [" ".join(map(letters, pair)) for pair in made if len(pair) == 2]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(ranks) + [3] * len(special))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(128000)
        writer.add_eos_token_id(128009)

    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=metadata)
    expected = oracle.encode(TEXT, bos=True, eos=False)
    for tokenizer in by_all_ways(path, tmp_path):
        assert tokenizer(TEXT)["input_ids"] == expected
        assert tokenizer.decode(expected, skip_special_tokens=True) == TEXT


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistral(tmp_path: Path, name: str) -> None:
    import sentencepiece

    file = package("mistral_common") / "data" / name
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = oracle.get_piece_size()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.model").write_bytes(file.read_bytes())

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([oracle.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([oracle.get_score(i) for i in range(size)])
        kinds = [
            2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1
            for i in range(size)
        ]
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=metadata)
    expected = [1, *oracle.encode(TEXT)]
    for tokenizer in (load_tokenizer(tmp_path / "folder"), *by_all_ways(path, tmp_path)):
        assert tokenizer(TEXT)["input_ids"] == expected
        assert tokenizer.decode(expected, skip_special_tokens=True) == TEXT
