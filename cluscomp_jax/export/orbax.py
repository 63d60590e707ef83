"""Plain parameter trees of a compressed checkpoint as one orbax item, decoded or as codebooks and indices.

The item is written one parameter at a time. In zarr form every array has a folder of its own, and one file describes
the tree. Items of one array each are put together by moving these folders and merging the descriptions.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.entries import DTYPES, Entry, MatrixEntry
from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.export.format import ExportOptions
from cluscomp_jax.export.iterate_parameters import copy_tokenizer, dense_array, ordered_entries, walk
from cluscomp_jax.runtime import atomic, json_files

PARAMS_NAME, CODEBOOKS_NAME = "params", "codebooks.json"
"""The orbax item; the shapes and axes that plain codebooks and indices do not say."""

_DESCRIPTION = "_METADATA"

USAGE = """```python
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore("/absolute/path/of/this/folder/params")
```

Decoded parameters in FlaxLlama layout, kernels `[d_in, d_out]`; `config.json` is the model's."""
CODEBOOK_USAGE = """```python
import json

import jax.numpy as jnp
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore("/absolute/path/of/this/folder/params")
described = json.load(open("codebooks.json"))  # {path: {"shape": [d_in, d_out], "axis": "out" or "in"}}


def decode(kernel, shape, axis):  # kernel: {"codebook": [codes, g], "index": [d_in, ceil(d_out/g)] or the like}
    vectors = kernel["codebook"][kernel["index"]]
    rows, columns, g = vectors.shape
    if axis == "in":
        vectors = jnp.swapaxes(vectors, 1, 2).reshape(rows * g, columns)
    else:
        vectors = vectors.reshape(rows, columns * g)
    return vectors[: shape[0], : shape[1]]
```

The compressed parameters as plain arrays, FlaxLlama layout, kernels `[d_in, d_out]`."""


def write_orbax(source: CheckpointSource, folder: Path, options: ExportOptions) -> None:
    """Writes the decoded parameters in FlaxLlama layout as one orbax item, `params`, into a folder that is empty."""
    entries, wanted = _decoded_entries(source, folder, options.dtype)
    arrays = ((path, dense_array(path, leaf, wanted)) for path, leaf in walk(source, entries))
    _write_item(folder, arrays)
    _write_config(source, folder)


def write_orbax_codebook(source: CheckpointSource, folder: Path, options: ExportOptions) -> None:
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
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in (entry.codebook_spec, entry.index_spec))
