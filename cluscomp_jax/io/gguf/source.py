"""A GGUF file as a ParamSource: dequantised through the `gguf` library, one block at a time.

Knows nothing of tokenizers, and of configs only that `gguf_config` reads them.
"""

import hashlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.gguf import config, header, keys
from cluscomp_jax.models import tensor_names
from cluscomp_jax.models.model import build_model, parameter_shapes, parse_model_config
from cluscomp_jax.runtime.extras import needed_for
from cluscomp_jax.runtime.file_stamps import FileStamps
from cluscomp_jax.runtime.lfs_pointer import refuse_lfs_pointer

with needed_for("a GGUF file", "hf"):
    import gguf

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_EXPERTS, _MOST_EXPERTS = re.compile(r"(.+_exps)\.(weight|bias)"), 2**16
_ROWS_AT_ONCE = 4096  # bounds the float32 copy while a large embedding is dequantised


class _Stored(NamedTuple):
    """A matrix or vector in a file: rows of a tensor from `first_row` on, of row-major `shape`."""

    tensor: "gguf.ReaderTensor"
    first_row: int
    shape: tuple[int, ...]


class _CheckedReader(gguf.GGUFReader):  # type: ignore[misc]
    """GGUFReader that refuses to read past the end, where slicing would silently return fewer bytes."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray:
        if self.byte_order == "S":
            raise ValueError("it is written in the other byte order than this machine's")
        # frombuffer checks the bounds, and is several times faster than slicing a memmap.
        return np.frombuffer(self.data, dtype, int(count), int(offset))


class GgufSource:
    """A ParamSource over a GGUF file, or the parts of one, of an architecture whose family has a table of names.

    Attributes:
      path: the file, or the first part.
      files: all parts, in order.
      metadata: {key: value} of the header: numbers, strings, and lists of them.
      model_config: the family's config, read from the header.
      model: the Model of that config.

    Args:
      path: a GGUF file; of a model in parts (NAME-00001-of-00003.gguf) the first, with the others next to it.
      dtype: of all arrays handed out; float32 keeps the dequantiser's exact values. None: float16 or float32 where most
        weights of the matrices are stored so, else bfloat16.

    Raises:
      InputError: no such file, not a whole GGUF file, a header that counts too much, an unknown architecture, a
        missing, unused or misshapen tensor.
    """

    def __init__(self, path: str | Path, *, dtype: Any = None):
        self.path = Path(path)
        _require_file(self.path)
        with FileStamps([self.path]).held():  # from before its header is read until all parts have stamps
            reader, self.metadata = _open(self.path)
            readers = {self.path: reader} | _open_others(self.path, self.metadata)
            self.files = tuple(readers)
            self._stamps = FileStamps(self.files)
        self._header_bytes = {path: int(reader.data_offset) for path, reader in readers.items()}
        self._tensors: dict[str, _Stored] = {}
        self._places: dict[str, Path] = {}
        for path, reader in readers.items():
            for name, stored in (found for tensor in reader.tensors for found in _matrices(tensor)):
                if name in self._tensors:
                    raise InputError(f"{path}: tensor {name} is in {self._places[name].name} too")
                if len(self._tensors) >= header.MOST_ENTRIES:
                    raise InputError(
                        f"{path}: more than {header.MOST_ENTRIES:,} tensors, those of experts counted each"
                    )
                self._tensors[name], self._places[name] = stored, path
        tensors = [tensor for reader in readers.values() for tensor in reader.tensors]
        self._dtype = np.dtype(_stored_dtype(tensors) if dtype is None else dtype)
        self._shapes = {name: stored.shape for name, stored in self._tensors.items()}
        self._check_types()
        try:
            self.model_config = parse_model_config(config.config_fields(self.metadata, self._shapes, self._read_small))
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        self.model = build_model(self.model_config)
        self._naming, self._needed = tensor_names.names_of(self.model_config, "gguf"), parameter_shapes(self.model)
        self._names, _ = tensor_names.match_tensors(self._shapes, self.model, self._naming, str(self.path))

    def load_block(self, i: int) -> Params:
        """Returns block i's tree; kernels [d_in, d_out].

        Raises:
          InputError: NaN or infinity, or the file was changed since it was opened.
        """
        prefix = f"{self.model.blocks_path}/{i}/"
        with self._stamps.held():
            return trees.unflatten({p: self._load(prefix + p) for p in self.model.block_shapes(i)})

    def load_outer(self) -> Params:
        """Returns embedding, last norm and, unless tied, the output head. Raises as `load_block` does."""
        with self._stamps.held():
            return trees.unflatten({path: self._load(path) for path in self.model.outer_shapes()})

    def fingerprint(self) -> str:
        """Returns a digest of the files' names, sizes, modification times and headers, not of their data."""
        digest = hashlib.sha256(self._stamps.fingerprint() + str(self._dtype).encode())
        for path, size in self._header_bytes.items():
            with path.open("rb") as file:
                digest.update(file.read(size))
        return digest.hexdigest()

    def _check_types(self) -> None:
        """Dequantises one row of zeros of each type, so that a type the library cannot read fails before the work."""
        for kind, (name, tensor) in {s.tensor.tensor_type: (n, s.tensor) for n, s in self._tensors.items()}.items():
            try:
                gguf.quants.dequantize(np.zeros(tensor.data.shape[-1:], tensor.data.dtype), kind)
            except NotImplementedError as error:
                raise InputError(f"{self._places[name]}: tensor {tensor.name}: {error}; use another file") from None

    def _load(self, path: str) -> np.ndarray:
        name, model_type = self._names[path], self.model_config.model_type
        array = self._read(name, self._dtype, tensor_names.rows_of(path, self._naming, self._needed))
        tensor_names.require_finite(array, name, str(self._places[name]))
        if model_type in self._naming.interleaved and "/self_attn/q_proj/" in path:
            array = _undo_permutation(array, self.model_config.num_attention_heads)
        elif model_type in self._naming.interleaved and "/self_attn/k_proj/" in path:
            array = _undo_permutation(array, self.model_config.num_key_value_heads)
        elif path.endswith("/weight") and getattr(self.model_config, "norm_weight", "cast") == "offset":
            array = (array.astype(np.float32) - 1).astype(array.dtype)  # llama.cpp's norms multiply by w
        return tensor_names.to_flax(path, array)

    def _read_small(self, name: str) -> np.ndarray:
        return self._read(name, np.dtype(np.float32), slice(None))

    def _read(self, name: str, dtype: np.dtype[Any], rows: slice) -> np.ndarray:
        """Returns rows of a tensor as stored, dequantised to `dtype`; read, not mapped: pages do not pile up."""
        (tensor, first_row, shape), path = self._tensors[name], self._places[name]
        raw = tensor.data if tensor.data.ndim == len(shape) else tensor.data.reshape(-1, tensor.data.shape[-1])
        begin, end, _ = rows.indices(shape[0])
        row, count = raw[:1].size, (end - begin) * raw[:1].size
        offset = int(tensor.data_offset) + (first_row + begin) * row * raw.itemsize
        stored = np.fromfile(path, raw.dtype, count=count, offset=offset)
        if stored.size != count:
            raise InputError(f"{path}: tensor {name} ends after {stored.size} of {count} values; fetch it again")
        stored = stored.reshape(end - begin, *raw.shape[1:])
        array = np.empty((len(stored), *shape[1:]), dtype)
        for start in range(0, len(array), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            array[part] = gguf.quants.dequantize(stored[part], tensor.tensor_type)
        return array


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Returns {key: value} of a GGUF header.

    Raises:
      InputError: it is not a whole GGUF file, or its header counts more than `gguf_header` allows.
    """
    return _open(Path(path))[1]


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is not a file")


def _open(path: Path) -> tuple[_CheckedReader, dict[str, Any]]:
    _require_file(path)
    refuse_lfs_pointer(path)
    header.check_counts(path)
    try:
        reader = _CheckedReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        if gguf.GGMLQuantizationType.__name__ in str(error):
            raise InputError(
                f"{path}: {error}: the installed package gguf {importlib.metadata.version('gguf')} does not know this "
                "type of tensor; pip install --upgrade gguf, or use another file"
            ) from None
        raise InputError(f"{path} is not a whole GGUF file: {str(error)[:120]}; fetch it again") from None
    try:
        keys.check_keys(metadata)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return reader, metadata


def _open_others(path: Path, metadata: Mapping[str, Any]) -> dict[Path, _CheckedReader]:
    """Returns {path: reader} of the parts after the first, of a model in parts; else nothing."""
    count = metadata.get("split.count", 1)
    if count <= 1:
        return {}
    named = _PART.fullmatch(path.name)
    if named is None or int(named[2]) != metadata.get("split.no", 0) + 1 or int(named[3]) != count:
        raise InputError(
            f"{path} is one of {count} parts, but is not called NAME-00001-of-{count:05d}.gguf; rename them"
        )
    parts = [path.with_name(f"{named[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if path != parts[0]:
        raise InputError(f"{path} is part {named[2]} of a model; name its first part: {parts[0]}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InputError(f"{path}: {len(missing)} of its {count} parts are missing, such as {missing[0]}; fetch them")
    others = {}
    for number, part in enumerate(parts[1:], 1):
        others[part], fields = _open(part)
        if (fields.get("split.no"), fields.get("split.count")) != (number, count):
            raise InputError(
                f"{part}: says that it is part {fields.get('split.no')} (from 0) of {fields.get('split.count')}, not "
                f"{number} of {count}; fetch it again"
            )
    return others


def _stored_dtype(tensors: Iterable[gguf.ReaderTensor]) -> Any:
    """Returns float16 or float32 where most weights of the matrices are stored so, else bfloat16."""
    weights: Counter[Any] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            weights[tensor.tensor_type] += int(tensor.n_elements)
    most = weights.most_common(1)[0][0] if weights else None
    whole = {gguf.GGMLQuantizationType.F16: np.float16, gguf.GGMLQuantizationType.F32: np.float32}
    return whole.get(most, ml_dtypes.bfloat16)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """The row-major shape; GGUF lists the fastest axis first."""
    return tuple(int(d) for d in reversed(tensor.shape))


def _matrices(tensor: "gguf.ReaderTensor") -> Iterator[tuple[str, _Stored]]:
    """Yields (name, where it is) of a tensor; of the experts in one, each with its number before ".weight"."""
    shape, named = _shape(tensor), _EXPERTS.fullmatch(tensor.name)
    if named is None or len(shape) != 3 or 0 in shape or shape[0] > _MOST_EXPERTS:
        yield tensor.name, _Stored(tensor, 0, shape)
        return
    for expert in range(shape[0]):
        yield f"{named[1]}.{expert}.{named[2]}", _Stored(tensor, expert * shape[1], shape[1:])


def _undo_permutation(stored: np.ndarray, heads: int) -> np.ndarray:
    """Returns q or k rows [d_out, …] in the order of Hugging Face.

    llama.cpp interleaves the two halves of each head for its rotary embedding: (head, half, pair) is
    stored as (head, pair, half).
    """
    pairs = stored.shape[0] // heads // 2
    return stored.reshape(heads, pairs, 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)
