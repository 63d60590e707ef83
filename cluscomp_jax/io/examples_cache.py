"""Rows of training files kept on disk, so that a large text is tokenised once.

    CACHE/DIGEST.safetensors    tokens, scored and, of JSON lines of conversations, lines, as in Examples

DIGEST is of all that the rows depend on: the file's bytes and form, the tokenizer, the settings, the versions of the
packages that tokenise. A file is found again under another name, and never after any of these has changed.
"""

import dataclasses
import hashlib
import json
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from cluscomp_jax.errors import InputError
from cluscomp_jax.examples import Examples
from cluscomp_jax.io import atomic
from cluscomp_jax.io.text import DATA_SETS, check_vocabulary
from cluscomp_jax.io.tokenizer import start_tokens
from cluscomp_jax.io.training_data import read_examples
from cluscomp_jax.settings import DataSettings

_FORMAT = 1


def read_cached_examples(
    cache: str | Path, spec: str | Path, tokenizer: Any, settings: DataSettings, *, vocab_size: int
) -> Examples:
    """Returns what `read_examples` returns, from the cache if it is there, else into it.

    Token arrays (.npy) and named data sets are read as ever and not kept.

    Args:
      cache: a folder, made if absent; nothing in it is ever removed.
      spec: as in `read_examples`.
      tokenizer: a fast one of transformers.
      settings: as in `read_examples`.
      vocab_size: of the model; every token must be below it.

    Raises:
      InputError: as `read_examples`; a tokenizer that is not fast; a damaged file of the cache.
      RunError: the cache cannot be written to.
    """
    path = Path(spec)
    if str(spec) in DATA_SETS or path.suffix == ".npy" or not path.is_file():
        return read_examples(spec, tokenizer, settings, vocab_size=vocab_size)
    kept = Path(cache) / f"{_digest(path, tokenizer, settings)}.safetensors"
    if kept.is_file():
        examples = _load(kept)
        check_vocabulary(examples.tokens, vocab_size, where=str(spec))
        return examples
    examples = read_examples(spec, tokenizer, settings, vocab_size=vocab_size)
    _store(examples, kept)
    return examples


def _digest(path: Path, tokenizer: Any, settings: DataSettings) -> str:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("this tokenizer cannot be told from another by its contents; leave the cache of tokens out")
    parts = {
        "format": _FORMAT,
        "file": atomic.file_sha256(path),
        "form": [suffix for suffix in path.suffixes[-2:] if suffix.lower() in (".jsonl", ".gz")],
        "settings": dataclasses.asdict(settings),
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token_id],
        "start": start_tokens(tokenizer),
        "versions": {name: version(name) for name in ("cluscomp-jax", "tokenizers", "transformers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _store(examples: Examples, path: Path) -> None:
    arrays = {"tokens": examples.tokens, "scored": examples.scored}
    if examples.lines is not None:
        arrays["lines"] = examples.lines
    with atomic.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{uuid.uuid4().hex}")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, _metadata(examples))
        atomic.sync(aside)
        atomic.publish(aside, path)


def _load(path: Path) -> Examples:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        examples = Examples(**arrays)
    except (safetensors.SafetensorError, InputError, OSError, TypeError) as error:
        raise InputError(f"{path}: is damaged: {error}; remove it") from None
    if metadata != _metadata(examples):
        raise InputError(f"{path}: its rows are not those that were stored; remove it")
    return examples


def _metadata(examples: Examples) -> dict[str, str]:
    return {"fingerprint": examples.fingerprint}
