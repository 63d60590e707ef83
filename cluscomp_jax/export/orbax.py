"""Plain parameter trees of a compressed checkpoint: one orbax item, or one msgpack file of Flax.

Both are written one parameter at a time. An orbax item in zarr form keeps every array in a folder of its own next to
one description of the tree, so that items of one array each are put together by moving folders and merging
descriptions. Msgpack is a stream of map headers, keys and leaves.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.entries import DTYPES, Entry, MatrixEntry
from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.export.iterate_parameters import copy_tokenizer, dense_array, ordered_entries, walk
from cluscomp_jax.runtime import atomic, json_files

PARAMS_NAME, MSGPACK_NAME, CODEBOOKS_NAME = "params", "flax_model.msgpack", "codebooks.json"
"""The orbax item; the msgpack file; the shapes and axes that plain codebooks and indices do not say."""

MAX_PIECE_BYTES = 2**30
"""Most bytes of one msgpack value, as in Flax."""

_DESCRIPTION = "_METADATA"


def write_orbax(source: CheckpointSource, folder: Path, *, dtype: str | None) -> None:
    """Writes the decoded parameters in FlaxLlama layout as one orbax item, `params`.

    Args:
      source: the checkpoint.
      folder: exists and is empty.
      dtype: of all arrays; None: each in its own.
    """
    entries, wanted = _decoded_entries(source, folder, dtype)
    arrays = ((path, dense_array(path, leaf, wanted)) for path, leaf in walk(source, entries))
    _write_item(folder, arrays)
    _write_config(source, folder)


def write_orbax_codebook(source: CheckpointSource, folder: Path) -> None:
    """Writes the compressed parameters as one orbax item, `params`, of plain arrays.

    A compressed kernel at path P becomes P/codebook [codes, g] and P/index, uint8 or uint16, whose shape and axis
    are in codebooks.json.
    """
    entries = ordered_entries(source)
    matrices = {path: entry for path, entry in entries.items() if isinstance(entry, MatrixEntry)}
    if not matrices:
        raise InputError("no parameter is compressed, so there is no codebook to export; export it as orbax")

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in walk(source, entries):
            if isinstance(leaf, CodebookArray):
                yield f"{path}/codebook", np.asarray(leaf.codebook)
                yield f"{path}/index", np.asarray(leaf.index)
            else:
                yield path, np.asarray(leaf)

    atomic.require_space(folder, sum(_codebook_bytes(entry) for entry in entries.values()))
    _write_item(folder, arrays())
    described = {path: {"shape": list(entry.shape), "axis": entry.axis} for path, entry in matrices.items()}
    (folder / CODEBOOKS_NAME).write_text(json_files.dumps(described), encoding="utf-8")
    _write_config(source, folder)


def write_msgpack(source: CheckpointSource, folder: Path, *, dtype: str | None) -> None:
    """Writes the decoded parameters as `flax.serialization.msgpack_restore` reads them.

    Args:
      source: the checkpoint.
      folder: exists and is empty.
      dtype: of all arrays; None: each in its own.
    """
    import msgpack

    entries, wanted = _decoded_entries(source, folder, dtype)
    children = _children(entries)
    packer = msgpack.Packer()
    parents: list[str] = []
    with (folder / MSGPACK_NAME).open("wb") as file:
        file.write(packer.pack_map_header(len(children[""])))
        for path, leaf in walk(source, _depth_first(entries)):
            *folders, name = path.split("/")
            shared = next((n for n, (a, b) in enumerate(zip(parents, folders, strict=False)) if a != b), None)
            shared = min(len(parents), len(folders)) if shared is None else shared
            for depth in range(shared, len(folders)):
                file.write(packer.pack(folders[depth]))
                file.write(packer.pack_map_header(len(children["/".join(folders[: depth + 1])])))
            parents = folders
            file.write(packer.pack(name))
            _pack_array(file, packer, dense_array(path, leaf, wanted))
    _write_config(source, folder)


def _pack_array(file: IO[bytes], packer: Any, array: np.ndarray) -> None:
    """Writes an array as flax.serialization packs it, without its copies.

    That is an ext value of type 1 around (shape, dtype's name, bytes); beyond a GiB, a map of flat pieces of it.
    """
    if array.nbytes > MAX_PIECE_BYTES:
        flat, piece = array.reshape(-1), MAX_PIECE_BYTES // array.itemsize
        file.write(packer.pack_map_header(3) + packer.pack("__msgpack_chunked_array__") + packer.pack(True))
        file.write(packer.pack("shape") + packer.pack({str(i): side for i, side in enumerate(array.shape)}))
        starts = range(0, flat.size, piece)
        file.write(packer.pack("chunks") + packer.pack_map_header(len(starts)))
        for i, start in enumerate(starts):
            file.write(packer.pack(str(i)))
            _pack_array(file, packer, flat[start : start + piece])
        return
    described = packer.pack_array_header(3) + packer.pack(array.shape) + packer.pack(array.dtype.name)
    described += b"\xc6" + struct.pack(">I", array.nbytes)
    file.write(b"\xc9" + struct.pack(">I", len(described) + array.nbytes) + b"\x01" + described)
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _depth_first(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns the entries in an order in which all paths of a folder are together.

    A folder takes the place of its last path, so that what is outside the blocks still comes before all of them, and no
    item is loaded twice.
    """
    order: dict[str, int] = {}
    for number, path in enumerate(entries):
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            order["/".join(parts[:depth])] = number

    def place(path: str) -> tuple[int, ...]:
        parts = path.split("/")
        return tuple(order["/".join(parts[:depth])] for depth in range(1, len(parts) + 1))

    return {path: entries[path] for path in sorted(entries, key=place)}


def _children(entries: Mapping[str, Entry]) -> dict[str, set[str]]:
    """Returns {path of a folder, "" for the root: names in it}."""
    found: dict[str, set[str]] = {}
    for path in entries:
        parts = path.split("/")
        for depth, name in enumerate(parts):
            found.setdefault("/".join(parts[:depth]), set()).add(name)
    return found


def _write_item(folder: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes {path: array} as the orbax item `params`, holding one array."""
    whole, part = folder / PARAMS_NAME, folder / "part"
    described: dict[str, Any] = {}
    for path, array in arrays:
        orbax_items.write_item(part, {path: array})
        mine = json.loads((part / _DESCRIPTION).read_text(encoding="utf-8"))
        if not described:
            described = mine
            part.rename(whole)
            continue
        described["tree_metadata"] |= mine["tree_metadata"]
        for entry in part.iterdir():
            if entry.is_dir():
                entry.rename(whole / entry.name)
        shutil.rmtree(part)
    (whole / _DESCRIPTION).write_text(json.dumps(described), encoding="utf-8")


def _decoded_entries(
    source: CheckpointSource, folder: Path, dtype: str | None
) -> tuple[dict[str, Entry], np.dtype[Any] | None]:
    """Returns (the entries in order, the dtype asked for), the disk having room for all of them decoded."""
    entries = ordered_entries(source)
    wanted = None if dtype is None else DTYPES[dtype]
    atomic.require_space(folder, sum(_dense_bytes(entry, wanted) for entry in entries.values()))
    return entries, wanted


def _write_config(source: CheckpointSource, folder: Path) -> None:
    (folder / "config.json").write_text(json_files.dumps(source.manifest.model_config), encoding="utf-8")
    copy_tokenizer(source, folder)


def _dense_bytes(entry: Entry, dtype: np.dtype[Any] | None) -> int:
    own = DTYPES[entry.codebook_dtype if isinstance(entry, MatrixEntry) else entry.dtype]
    return math.prod(entry.shape) * (dtype or own).itemsize


def _codebook_bytes(entry: Entry) -> int:
    if not isinstance(entry, MatrixEntry):
        return entry.num_bytes
    codes = entry.num_codes * entry.group_size * DTYPES[entry.codebook_dtype].itemsize
    return codes + math.prod(entry.index_shape) * (1 if entry.num_codes <= 256 else 2)
