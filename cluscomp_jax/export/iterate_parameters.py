"""The parameters of a checkpoint one after the other, with one block in memory. Knows no format of export."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.checkpoint.entries import Entry
from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.checkpoint.writer import TOKENIZER_FILES
from cluscomp_jax.core import codebook, trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.safetensors_source import GENERATION_CONFIG
from cluscomp_jax.io.tokenizer import load_tokenizer, write_tokenizer
from cluscomp_jax.models.model import build_model


def ordered_entries(source: CheckpointSource) -> dict[str, Entry]:
    """Returns {full path: entry}: first what is outside the blocks, then block after block. Reads no tensor."""
    blocks_path = build_model(source.model_config).blocks_path
    entries = source.manifest.contents.entries
    return dict(sorted(entries.items(), key=lambda item: _block(item[0], blocks_path)[0]))


def walk(source: CheckpointSource, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Any]]:
    """Yields (full path, leaf) in the order of `ordered_entries`; every item is loaded, and verified, once.

    Raises:
      InputError: a file of the checkpoint is damaged.
    """
    blocks_path = build_model(source.model_config).blocks_path
    number, item = None, dict[str, Any]()
    for path in entries:
        which, name = _block(path, blocks_path)
        if which != number:
            item.clear()
            number, item = which, trees.flatten(source.load_outer() if which < 0 else source.load_block(which))
        yield path, item.pop(name)


def copy_tokenizer(source: CheckpointSource, folder: Path) -> None:
    """Writes the checkpoint's tokenizer and stop tokens; of a tokenizer that cannot be read, its files as they are."""
    if source.tokenizer_path is None:
        return
    names: tuple[str, ...] = (GENERATION_CONFIG,)
    try:
        write_tokenizer(load_tokenizer(source.tokenizer_path), folder)
    except InputError:
        names = TOKENIZER_FILES
    for name in names:
        if (source.tokenizer_path / name).is_file():
            shutil.copyfile(source.tokenizer_path / name, folder / name)


def dense_array(path: str, leaf: Any, dtype: np.dtype[Any] | None) -> np.ndarray:
    """Returns a parameter as a plain array, decoded where it is compressed, in `dtype` (None: its own).

    Raises:
      InputError: a value is not finite, or beyond the range of `dtype`.
    """
    array = np.asarray(codebook.decode(leaf) if isinstance(leaf, CodebookArray) else leaf)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: holds NaN or Inf, which no export is made of")
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        largest = float(np.abs(array.astype(np.float32)).max())
        raise InputError(f"{path}: {largest:g} is beyond the range of {dtype.name}; choose bfloat16 or float32")
    return cast


def _block(path: str, blocks_path: str) -> tuple[int, str]:
    """Returns the block of a path and the path within it; -1 and the path itself outside the blocks."""
    if not path.startswith(f"{blocks_path}/"):
        return -1, path
    number, _, name = path.removeprefix(f"{blocks_path}/").partition("/")
    return int(number), name
