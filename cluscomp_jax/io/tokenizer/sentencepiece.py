"""The tokenizer of a folder that has only tokenizer.model: SentencePiece's BPE, as Llama 1 and 2 and Mistral have it.

Reads the file's protocol buffer itself (sentencepiece_model.proto of github.com/google/sentencepiece); the package
sentencepiece does not say which pieces are user-defined.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer.folder import read_chat_template, read_settings, token_text
from cluscomp_jax.runtime.json_files import read_object
from cluscomp_jax.runtime.lfs_pointer import refuse_lfs_pointer

SENTENCEPIECE_MODEL = "tokenizer.model"
_MAX_BYTES = 1 << 28
_BPE = 2
_CONTROL = 3
_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
"""{role: field number in TrainerSpec, default}."""
_ROLES = {"unknown": "unk_token", "bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}


def read_sentencepiece(folder: Path) -> Any:
    """Returns the transformers tokenizer (fast, no PyTorch) of a folder that holds tokenizer.model.

    Raises:
      InputError: the file is no SentencePiece model, or none of BPE, or one that rewrites texts first.
    """
    file = folder / SENTENCEPIECE_MODEL
    if file.stat().st_size > _MAX_BYTES:
        raise InputError(f"{file}: has {file.stat().st_size} bytes; a tokenizer has at most {_MAX_BYTES}")
    refuse_lfs_pointer(file)
    try:
        described = _model(file.read_bytes())
    except InputError as error:
        raise InputError(f"{file}: {error}; fetch tokenizer.json of the model") from None
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error):
        raise InputError(
            f"{file}: is no SentencePiece model (Llama 3's file of this name is tiktoken's, without special tokens); "
            "fetch tokenizer.json of the model"
        ) from None
    fields = read_settings(folder)
    _add_from_config(described, folder, fields)
    from cluscomp_jax.io.tokenizer.gguf import build_tokenizer  # here, because it needs the extra hf

    tokenizer = build_tokenizer(described, where=str(file))
    tokenizer.chat_template = read_chat_template(folder, fields)
    return tokenizer


def _model(data: bytes) -> dict[str, Any]:
    """Returns what a GGUF header says of the tokenizer that a ModelProto describes."""
    tokens, scores, types = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            tokens.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            types.append(piece.get(3, 1))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not tokens:
        raise ValueError("no pieces")
    if trainer.get(3, 1) != _BPE:
        raise InputError("is SentencePiece's, but no BPE")
    if normalizer.get(2) or normalizer.get(4, 1) or trainer.get(24, 0):
        raise InputError("is SentencePiece's, but rewrites texts (it normalises, or removes spaces)")
    ids = {role: _signed(trainer.get(number, default)) for role, (number, default) in _IDS.items()}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        **{f"tokenizer.ggml.{role}_token_id": number for role, number in ids.items() if number >= 0},
    }


def _add_from_config(described: dict[str, Any], folder: Path, fields: dict[str, Any]) -> None:
    """Adds tokens, and roles that the files next to tokenizer.model give."""
    tokens = described["tokenizer.ggml.tokens"]
    for token, number in sorted(_added_tokens(folder, fields).items(), key=lambda pair: pair[1]):
        if number < len(tokens) and tokens[number] == token:
            continue
        if number != len(tokens):
            raise InputError(f"{folder}: added token {token!r} has number {number}; {len(tokens)} is expected")
        tokens.append(token)
        described["tokenizer.ggml.scores"].append(0.0)
        described["tokenizer.ggml.token_type"].append(_CONTROL)
    numbers = {token: number for number, token in enumerate(tokens)}
    for role, key in _ROLES.items():
        named = token_text(fields.get(key))
        if named in numbers:
            described[f"tokenizer.ggml.{role}_token_id"] = numbers[named]
    described["tokenizer.ggml.add_bos_token"] = fields.get("add_bos_token") is not False
    described["tokenizer.ggml.add_eos_token"] = fields.get("add_eos_token") is True


def _added_tokens(folder: Path, fields: dict[str, Any]) -> dict[str, int]:
    """Returns {token: number} of added_tokens.json and of tokenizer_config.json."""
    file = folder / "added_tokens.json"
    added = read_object(file) if file.is_file() else {}
    decoder = fields.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and number.isdigit():
            added[str(token.get("content"))] = int(number)
    for token, number in added.items():
        if not isinstance(token, str) or not isinstance(number, int):
            raise InputError(
                f"{folder}: added token {token!r} has number {number!r}; a text and an integer are expected"
            )
    return added


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (field number, value) of a protocol buffer: int of a varint, bytes of all others.

    Raises:
      ValueError, IndexError: it is none.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"wire type {kind}")
        if size > len(data) - at:
            raise ValueError("cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def _signed(number: int) -> int:
    """Returns an int32 that a varint holds as 64 bits of two's complement."""
    return number - (1 << 64) if number >= 1 << 63 else number
