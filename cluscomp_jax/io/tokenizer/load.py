"""Tokenizers through transformers, without PyTorch and without remote code; text to token ids.

Knows no models. Texts are encoded whole, once, with no more than the tokenizer's own tokens in front.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.hub import download, transformers
from cluscomp_jax.io.tokenizer.folder import TOKENIZER_JSON, read_tokenizer
from cluscomp_jax.io.tokenizer.sentencepiece import SENTENCEPIECE_MODEL, read_sentencepiece
from cluscomp_jax.runtime.json_files import read_object

TOKENIZER_FOLDER = "tokenizer"  # inside a compressed checkpoint
_VOCABULARIES = (TOKENIZER_JSON, SENTENCEPIECE_MODEL, "vocab.json", "vocab.txt")
_PROBE = "a"


def load_tokenizer(spec: str | Path) -> Any:
    """Returns the transformers tokenizer of a model.

    Args:
      spec: a .gguf file, a Hugging Face folder, a compressed checkpoint (its sub-folder "tokenizer"), or a hub id.

    Raises:
      InputError: there is no tokenizer, or it needs remote code; the extra `hf` is missing.
    """
    path = Path(spec)
    if path.is_file():
        from cluscomp_jax.io.gguf.source import read_metadata  # here, because they need the extra hf
        from cluscomp_jax.io.tokenizer.gguf import build_tokenizer

        return build_tokenizer(read_metadata(path), where=str(path))
    folder = path / TOKENIZER_FOLDER if (path / TOKENIZER_FOLDER).is_dir() else path
    return _of_folder(folder if path.is_dir() else download(str(spec)))


def _of_folder(folder: Path) -> Any:
    if (folder / TOKENIZER_JSON).is_file():
        return read_tokenizer(folder)
    if (folder / SENTENCEPIECE_MODEL).is_file():
        return read_sentencepiece(folder)
    return guess_tokenizer(folder)


def guess_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer that transformers makes of older files, such as vocab.json and merges.txt."""
    config = folder / "tokenizer_config.json"
    if config.is_file() and "auto_map" in read_object(config):
        raise InputError(f"{folder}: tokenizer_config.json names code of its own (auto_map), which is never run")
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers 5.0 would make an empty tokenizer
        raise InputError(f"{folder}: no tokenizer could be loaded: it holds none of {', '.join(_VOCABULARIES)}")
    library = transformers()
    try:
        return library.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: no tokenizer could be loaded: {reason}") from None


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """Returns the token ids int32 [tokens] of a whole text, led by the tokenizer's own start tokens.

    Llama's tokenizer puts its begin token once before the text, SmolLM2's nothing. A text longer than the
    model's context is no error here and gives no warning.
    """
    ids = _encode(tokenizer, text, special=False)
    return np.asarray(start_tokens(tokenizer) + ids, dtype=np.int32)


def start_tokens(tokenizer: Any) -> list[int]:
    """Returns the ids the tokenizer puts before every text."""
    plain, whole = _encode(tokenizer, _PROBE, special=False), _encode(tokenizer, _PROBE, special=True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise InputError(
        f"the tokenizer encodes {_PROBE!r} as {plain}, with its special tokens as {whole}; it is not supported"
    )


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose=False silences exactly the warning that the text exceeds the model's context.
    encoded = tokenizer(
        text, add_special_tokens=special, truncation=False, padding=False, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])
