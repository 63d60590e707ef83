"""Rows of training files kept on disk, so that a large text is tokenised once.

    CACHE/DIGEST.safetensors    tokens, scored and, of conversations, lines and left_out: those of TokenRows

DIGEST is of all that the rows depend on: the file's bytes and form, the tokenizer, the settings, the versions of the
packages that make rows. A file is found again under another name of the same form, and never after any of these has
changed. A chat template that writes today's date keeps the date of the first run.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer import start_tokens
from cluscomp_jax.runtime import atomic
from cluscomp_jax.runtime.extras import needed_for
from cluscomp_jax.runtime.file_stamps import FileStamps
from cluscomp_jax.text.json_lines import holds_json_lines
from cluscomp_jax.text.text import DATA_SETS, check_vocabulary
from cluscomp_jax.text.token_rows import TokenRows
from cluscomp_jax.text.training_data import read_examples

with needed_for("a cache of tokens", "hf"):
    import safetensors
    from safetensors.numpy import save

_FORMAT = 1
_PACKAGES = ("cluscomp-jax", "jinja2", "tokenizers", "transformers")


def read_cached_examples(
    cache: str | Path,
    spec: str | Path,
    tokenizer: Any,
    settings: DataConfig,
    *,
    vocab_size: int,
    store: bool = True,
) -> TokenRows:
    """Returns what `read_examples` returns, from the cache if it is there, else into it.

    Token arrays (.npy) and named data sets are read as ever and not kept.

    Args:
      cache: a folder, made if absent; no rows in it are ever removed.
      spec: as in `read_examples`.
      tokenizer: a fast one of transformers.
      settings: as in `read_examples`.
      vocab_size: of the model; every token must be below it.
      store: False keeps nothing that is not there yet: of several processes one does.

    Raises:
      InputError: as `read_examples`; a tokenizer that is not fast; a folder that cannot be written to; a damaged file
        of the cache.
      RunError: the disk is full.
    """
    path = Path(spec)
    if str(spec) in DATA_SETS or path.suffix == ".npy" or not path.is_file():
        return read_examples(spec, tokenizer, settings, vocab_size=vocab_size)
    with FileStamps([path]).held():  # without it the rows of other bytes might be kept under the digest of these
        kept = Path(cache) / f"{_digest(path, tokenizer, settings)}.safetensors"
        if kept.is_file():
            examples = _load(kept)
            check_vocabulary(examples.tokens, vocab_size, where=str(spec))
            return examples
        if store:
            _require_writable(kept.parent)
        examples = read_examples(spec, tokenizer, settings, vocab_size=vocab_size)
    if store:
        _store(examples, kept)
    return examples


def _digest(path: Path, tokenizer: Any, settings: DataConfig) -> str:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{path}: this tokenizer cannot be told from another by its contents, so its tokens cannot be kept; leave "
            "out the cache (--token-cache)"
        )
    start = start_tokens(tokenizer)  # first: it settles what the tokenizer says of truncation
    parts = {
        "format": _FORMAT,
        "file": atomic.file_sha256(path),
        "form": [holds_json_lines(path), path.suffix if path.suffix.lower() == ".gz" else ""],
        "settings": dataclasses.asdict(settings),
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), getattr(tokenizer, "split_special_tokens", False), start],
        "template": [tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}],
        "versions": {name: version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _require_writable(folder: Path) -> None:
    """Tokenising takes minutes; what can never be stored is said before."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {there} is no folder that can be written to; choose another folder")


def _store(examples: TokenRows, path: Path) -> None:
    arrays = {"tokens": examples.tokens, "scored": examples.loss_mask}
    if examples.lines is not None:
        arrays["lines"] = examples.lines
    if len(examples.left_out):
        arrays["left_out"] = examples.left_out
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    aside = path.with_suffix(f".{uuid.uuid4().hex}")
    with atomic.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(save(arrays, _checksum(arrays)))
            atomic.sync(aside)
            atomic.publish(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _load(path: Path) -> TokenRows:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        examples = TokenRows(**{"loss_mask" if name == "scored" else name: array for name, array in arrays.items()})
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}; choose another folder") from None
    except (safetensors.SafetensorError, InputError, TypeError) as error:
        raise InputError(f"{path}: is damaged: {error}; remove it") from None
    if metadata != _checksum(arrays):
        raise InputError(f"{path}: its rows are not those that were stored; remove it")
    return examples


def _checksum(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return {"sha256": digest.hexdigest()}
