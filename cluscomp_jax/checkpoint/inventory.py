"""A checkpoint folder compared with its manifest: shapes, files, sizes, checksums; and items read by it.

Used on finished checkpoints and, by the writer, on the finished items of an unfinished one.
"""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.entries import check_owners, decode, stored_arrays
from cluscomp_jax.checkpoint.fields import FileEntry
from cluscomp_jax.checkpoint.manifest import CONTENT_FOLDERS, Contents
from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model
from cluscomp_jax.runtime import atomic

REST = "rest"
TOKENIZER = "tokenizer"
CARRIED = "carried"
"""The folder of what is around a text model: not compressed, and read by no item."""
BLOCKS = "blocks"

MOST_TIMES = 64
"""The most memory an item may take, as a multiple of the bytes of its files.

Unpacking makes an index 8 times as large at most (1 bit to 1 byte). Earlier releases could code an item by zstd, which
they let shorten it 8 times at most. The most that a real model reaches is far below: 1.5 of zstd for 16-bit weights.
"""
ALLOWANCE = 64 * 2**20
"""What all items together may take beyond that: matrices of one code, which have no index on disk."""


def block_folder(i: int) -> str:
    """Returns the folder of block i within a checkpoint."""
    return f"{BLOCKS}/{i:05d}"


def model_shapes(model: Model) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns {item folder: {full path: shape}} of all parameters of a model."""
    shapes = {
        block_folder(i): {f"{model.blocks_path}/{i}/{path}": shape for path, shape in model.block_shapes(i).items()}
        for i in range(model.num_blocks)
    }
    return {**shapes, REST: dict(model.outer_shapes())}


def item_prefix(model: Model, folder: str) -> str:
    """Returns the prefix that makes paths within an item full: "model/layers/3/" for block 3, "" outside the blocks."""
    return "" if folder == REST else f"{model.blocks_path}/{int(folder.rpartition('/')[2])}/"


def check_shapes(contents: Contents, shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """Returns if the contents hold exactly the parameters {full path: shape}.

    Raises:
      InputError: a parameter is missing, unknown or of another shape.
    """
    for path in sorted({**shapes, **contents.entries}):
        want = shapes.get(path)
        entry = contents.entries.get(path)
        if want is None or entry is None:
            reason = "the model config has no such parameter" if want is None else "it is missing"
            raise InputError(f"{where}: {path}: {reason}; the model config and the parameters do not belong together")
        if tuple(entry.shape) != tuple(want):
            raise InputError(f"{where}: {path} has shape {list(entry.shape)}; the model config says {list(want)}")


def split(contents: Contents, model: Model, where: Path) -> dict[str, Contents]:
    """Returns {item folder: its part of the contents}; "tokenizer" and "carried" too where there are these.

    Raises:
      InputError: the parameters or the item folders are not those of the model.
    """
    shapes = model_shapes(model)
    check_shapes(contents, {path: shape for item in shapes.values() for path, shape in item.items()}, where)
    parts = {folder: Contents({path: contents.entries[path] for path in item}, {}) for folder, item in shapes.items()}
    for folder, part in parts.items():
        prefix = item_prefix(model, folder)
        check_owners({path.removeprefix(prefix): entry for path, entry in part.entries.items()}, where)
    for name, entry in contents.files.items():
        depth = 2 if name.startswith(f"{BLOCKS}/") else 1
        folder = "/".join(name.split("/")[:depth])
        if folder not in parts and folder not in (TOKENIZER, CARRIED):
            raise InputError(f"{where}: file {name!r} belongs to no block of the {model.num_blocks} of the model")
        parts.setdefault(folder, Contents({}, {})).files[name] = entry
    return parts


def list_files(folder: Path, name: str) -> dict[str, FileEntry]:
    """Returns {path: entry} of all files of `folder`, which is `name` in the checkpoint; reads each once."""
    return {
        f"{name}/{file}": FileEntry((folder / file).stat().st_size, atomic.file_sha256(folder / file))
        for file in atomic.files_below(folder)
    }


def check_files(root: Path, contents: Contents, folders: Sequence[str] = CONTENT_FOLDERS) -> None:
    """Returns if the content folders below `root` hold exactly the listed files, each of its size; reads none.

    Args:
      root: the checkpoint.
      contents: its files are those listed.
      folders: in `root`, which hold nothing else.

    Raises:
      InputError: a file is missing, unlisted, of another size, or not a regular file.
    """
    found = {name for name in atomic.files_below(root) if name.split("/")[0] in folders}
    if extra := sorted(found - contents.files.keys()):
        link = " and is a link, which is not followed" if (root / extra[0]).is_symlink() else ""
        raise InputError(f"{root}: {extra[0]} is not in the manifest{link}; remove it, or take the checkpoint anew")
    for name, entry in contents.files.items():
        if name not in found:
            raise InputError(f"{root}: {name} is missing; take the checkpoint anew")
        status = (root / name).lstat()
        if stat.S_ISLNK(status.st_mode):
            raise InputError(
                f"{root}: {name} is a link, and a checkpoint holds its own files; copy the folder with what its links "
                "name (cp -rL), and give the copy"
            )
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{root}: {name} is not a regular file; take the checkpoint anew")
        if status.st_size != entry.size:
            raise InputError(
                f"{root}: {name} has {status.st_size} bytes, the manifest says {entry.size}; it is damaged"
            )


def check_expansion(root: Path, parts: Mapping[str, Contents]) -> None:
    """Returns if no item is to take far more memory than its files have bytes; reads nothing.

    Args:
      root: the checkpoint, for the error.
      parts: {item folder: its contents}, the sizes of files compared with the disk.

    Raises:
      InputError: what items take beyond MOST_TIMES the bytes of their files is more than ALLOWANCE.
    """
    beyond = 0
    for folder, part in parts.items():
        stored = sum(file.size for file in part.files.values())
        loaded = sum(entry.loaded_bytes for entry in part.entries.values())
        beyond += max(0, loaded - MOST_TIMES * stored)
        if beyond > ALLOWANCE:
            raise InputError(
                f"{root}: {folder} has {stored:,} bytes of files and would take {loaded:,} bytes of memory; more than "
                f"{MOST_TIMES} times as many are not read; take the checkpoint anew"
            )


def verify(root: Path, contents: Contents) -> None:
    """Returns if every listed file below `root` has its size and SHA-256; reads each file once.

    Raises:
      InputError: a file cannot be read, or differs.
    """
    for name, entry in contents.files.items():
        path = root / name
        try:
            size, sha256 = path.lstat().st_size, atomic.file_sha256(path)
        except OSError as error:
            raise InputError(f"{root}: {name} cannot be read: {error.strerror or error}") from error
        if (size, sha256) != (entry.size, entry.sha256):
            raise InputError(f"{root}: {name} does not have the SHA-256 of the manifest; it is damaged, take it anew")


def load_item(root: Path, folder: str, contents: Contents, *, prefix: str) -> Params:
    """Returns the parameters of one item, their paths less `prefix`, after verifying its files.

    Raises:
      InputError: a file is damaged, or the item does not hold what the contents say.
    """
    verify(root, contents)
    entries = {path.removeprefix(prefix): entry for path, entry in contents.entries.items()}
    check_owners(entries, root / folder)
    expected = {p: spec for path, entry in entries.items() for p, spec in stored_arrays(path, entry).items()}
    arrays = orbax_items.read_item(root / folder, expected)
    return trees.unflatten({path: decode(path, entry, arrays) for path, entry in entries.items()})
