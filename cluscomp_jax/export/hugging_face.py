"""Hugging Face folders of a compressed checkpoint: dense safetensors, or AQLM. Written tensor by tensor.

Knows the folder's files and their order; the AQLM scheme is `aqlm`'s.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.checkpoint.entries import DTYPES, Entry, MatrixEntry, TensorEntry
from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.export import aqlm
from cluscomp_jax.export.format import DEFAULT_SHARD_BYTES, ExportOptions
from cluscomp_jax.export.iterate_parameters import copy_tokenizer, dense_array, ordered_entries, walk
from cluscomp_jax.io.hf.carried import open_carried
from cluscomp_jax.io.hf.safetensors_source import GENERATION_CONFIG
from cluscomp_jax.io.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from cluscomp_jax.models.tensor_names import (
    TensorNames,
    is_transposed,
    names_of,
    refuse_fused_aqlm,
    stored_shape,
)
from cluscomp_jax.runtime import atomic, json_files

_TOKENIZER_USAGE = (
    "PreTrainedTokenizerFast takes tokenizer.json as it is. AutoTokenizer chooses a class by model_type, and some of "
    "its classes split texts in another way."
)
DENSE_USAGE = (
    """```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = PreTrainedTokenizerFast.from_pretrained("this folder")
```

The matrices are stored decoded, so any server of the original model serves it; it takes the original's memory.

"""
    + _TOKENIZER_USAGE
)
NESTED_USAGE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("this folder")
processor = AutoProcessor.from_pretrained("this folder")
```

The text model's matrices are stored decoded. Every other tensor, and the files of processor and tokenizer, are those of
the original model, byte for byte."""
AQLM_USAGE = (
    """```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # pip install transformers accelerate aqlm[cpu]

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = PreTrainedTokenizerFast.from_pretrained("this folder")
```

AQLM checkpoints decode to exactly the compressed weights. Matrices cut along "in" with g of 8 or 16 and 16-bit codes
are the form that aqlm's CUDA kernels run; others are decoded at every call.

"""
    + _TOKENIZER_USAGE
)


CONFIG = "config.json"
_DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Fields of config.json that name the dtype in which transformers loads a model: of version 5, of version 4."""


def write_dense(source: CheckpointSource, folder: Path, options: ExportOptions) -> None:
    """Writes the decoded model as safetensors with its config and tokenizer into a folder that is empty.

    Of a text model inside a larger one, the whole: the tensors around it as they are, whatever `dtype`, and its files.
    """
    wanted = None if options.dtype is None else DTYPES[options.dtype]
    entries = ordered_entries(source)
    names = names_of(source.model_config, "hugging_face")
    joined = _Joined(names, entries, wanted)
    specs, place = joined.specs, source.carried_path()
    carried = None if place is None else open_carried(place)
    if carried is not None:
        specs = [spec._replace(name=carried.names.stored(spec.name)) for spec in specs] + carried.specs
    with _writer(folder, specs, options) as writer:
        for path, leaf in walk(source, entries):
            whole = joined.add(path, _stored_form(path, dense_array(path, leaf, wanted)))
            if whole is not None:
                writer.write(whole)
        if carried is not None:
            carried.write_tensors(writer)
    if carried is None:
        _write_companions(source, folder, {"dtype": options.dtype or _common_dtype(entries)})
    else:
        carried.copy_files(folder)
        _rewrite_dtype(folder / CONFIG, options.dtype)


def _rewrite_dtype(path: Path, dtype: str | None) -> None:
    """Has a config.json of another program, and the configs in it, name `dtype`; None: it stays as it is."""
    if dtype is None:
        return

    def renamed(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: renamed(name, inner) for name, inner in value.items()}
        return dtype if name in _DTYPE_FIELDS and isinstance(value, str) else value

    fields: dict[str, Any] = renamed("", json_files.read_object(path, foreign=True))
    if not any(name in fields for name in _DTYPE_FIELDS):
        fields["dtype"] = dtype
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


class _Joined:
    """Stored tensors out of parameters, which come one after another: a fused one when the last of its parts is there.

    Attributes:
      specs: of the tensors, in the order in which they become whole.
    """

    def __init__(self, names: TensorNames, entries: Mapping[str, Entry], dtype: np.dtype[Any] | None):
        self._names = names
        self._parts: dict[str, dict[str, np.ndarray]] = {}
        last: dict[str, str] = {}
        for path in entries:
            stored = names.name(path)
            last.pop(stored, None)
            last[stored] = path
        self.specs = [self._spec(path, entries, dtype) for path in last.values()]
        self._dtypes = {spec.name: spec.dtype for spec in self.specs}

    def add(self, path: str, part: np.ndarray) -> np.ndarray | None:
        """Returns the stored tensor that the parameter at `path`, in its stored form, makes whole; else None."""
        name = self._names.name(path)
        paths, there = self._names.paths(name), self._parts.setdefault(name, {})
        there[path] = part
        if len(there) < len(paths):
            return None
        del self._parts[name]
        dtype = self._dtypes[name]
        parts = [there[one].astype(dtype, copy=False) for one in paths]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _spec(self, path: str, entries: Mapping[str, Entry], dtype: np.dtype[Any] | None) -> TensorSpec:
        name = self._names.name(path)
        paths = self._names.paths(name)
        own = {_dtype_of(entries[one]) for one in paths}
        # Parts of two 16-bit formats have float32 in common.
        found = own.pop() if len(own) == 1 else np.dtype(np.float32)
        shape = stored_shape(paths, {one: entries[one].shape for one in paths})
        return TensorSpec(name, dtype or found, shape)


def write_aqlm(source: CheckpointSource, folder: Path, options: ExportOptions) -> None:
    """Writes the model as an AQLM checkpoint that transformers loads into a folder that is empty.

    Raises:
      InputError: AQLM cannot hold it.
    """
    entries = ordered_entries(source)
    names = names_of(source.model_config, "hugging_face")
    refuse_fused_aqlm(source.model_config)
    scheme = aqlm.scheme_of(entries, names, bits=options.code_bits)
    specs = []
    for path, entry in entries.items():
        specs += scheme.specs(path, entry) if isinstance(entry, MatrixEntry) else [_dense_spec(path, entry, names)]
    with _writer(folder, specs, options) as writer:
        for path, leaf in walk(source, entries):
            if isinstance(leaf, CodebookArray):
                for array in scheme.tensors(leaf):
                    writer.write(array)
            else:
                writer.write(_stored_form(path, np.asarray(leaf)))
    fields = {"dtype": _common_dtype(entries), "quantization_config": scheme.quantization_config()}
    _write_companions(source, folder, fields)


def _writer(folder: Path, specs: list[TensorSpec], options: ExportOptions) -> SafetensorsWriter:
    atomic.require_space(folder, sum(spec.num_bytes for spec in specs))
    return SafetensorsWriter(folder, specs, shard_bytes=options.shard_bytes or DEFAULT_SHARD_BYTES)


def _dense_spec(path: str, entry: Entry, names: TensorNames) -> TensorSpec:
    return TensorSpec(names.name(path), _dtype_of(entry), stored_shape([path], {path: entry.shape}))


def _dtype_of(entry: Entry) -> np.dtype[Any]:
    return DTYPES[entry.codebook_dtype if isinstance(entry, MatrixEntry) else entry.dtype]


def _stored_form(path: str, array: np.ndarray) -> np.ndarray:
    return array.T if is_transposed(path) else array


def _common_dtype(entries: dict[str, Entry]) -> str:
    """Returns the dtype of most weights outside the compressed matrices, which is that of the original model."""
    count: Counter[str] = Counter()
    for entry in entries.values():
        if isinstance(entry, TensorEntry):
            count[entry.dtype] += int(np.prod(entry.shape))
    return count.most_common(1)[0][0]


def _write_companions(source: CheckpointSource, folder: Path, fields: dict[str, Any]) -> None:
    """Writes config.json, the tokenizer's files and generation_config.json."""
    config = {**source.manifest.model_config, **fields}
    (folder / CONFIG).write_text(json_files.dumps(config), encoding="utf-8")
    copy_tokenizer(source, folder)
    if not (folder / GENERATION_CONFIG).exists():
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        stops = {name: config[name] for name in names if config.get(name) is not None}
        (folder / GENERATION_CONFIG).write_text(json_files.dumps(stops), encoding="utf-8")
