"""A Hugging Face folder as a ParamSource: config.json, and safetensors in one file or in shards.

Knows which file holds which tensor; not the file format, not the names of tensors, not tokenizers.
Pickled weights (pytorch_model.bin) are never opened.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.safetensors_file import Entry, read_header, read_pieces, read_tensor
from cluscomp_jax.models import tensor_names
from cluscomp_jax.models.model import Model, parameter_shapes, parse_model_config
from cluscomp_jax.models.nesting import NestedNames, Nesting, names_in
from cluscomp_jax.runtime.file_stamps import FileStamps
from cluscomp_jax.runtime.json_files import read_object

GENERATION_CONFIG = "generation_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SERVED = ("bfloat16", "float16", "float32", "float64")


def read_config(folder: str | Path) -> Any:
    """Returns the family's config of a Hugging Face folder.

    The stop tokens are those of generation_config.json where it has any: chat models name theirs only there.

    Raises:
      InputError: config.json is missing, no JSON, of an unknown model_type, or describes quantised weights.
    """
    folder = Path(folder)
    fields = read_object(folder / "config.json")
    if fields.get("quantization_config"):
        raise InputError(f"{folder} holds weights quantised with {quant_method(fields)!r}; give the original model")
    return parse_folder_config(folder, fields)


def quant_method(fields: Mapping[str, Any]) -> str | None:
    """Returns the quant_method of a config.json mapping, None where the weights are plain."""
    quantisation = fields.get("quantization_config")
    return str(quantisation.get("quant_method")) if isinstance(quantisation, Mapping) else None


def parse_folder_config(folder: Path, fields: dict[str, Any]) -> Any:
    """Returns the family's config of `fields`, with the stop tokens of the folder's generation_config.json.

    Raises:
      InputError: an unknown model_type, or a value the family cannot serve.
    """
    if (folder / GENERATION_CONFIG).is_file():
        stops = read_object(folder / GENERATION_CONFIG, foreign=True).get("eos_token_id")
        fields |= {"eos_token_id": stops} if stops is not None else {}
    try:
        return parse_model_config(fields)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


class SafetensorsSource:
    """A ParamSource over the safetensors of a Hugging Face folder.

    Attributes:
      files: the safetensors files, and the index where there is one.
      stamps: of these files, as they were opened.
      nested_names: how the files name the tensors of a nested model; None: the model is not nested.
      carried: {name: entry} of the tensors outside a nested model.

    Args:
      folder: holds model.safetensors, or model.safetensors.index.json and its shards.
      model: says which tensors of which shapes there must be.
      nesting: how the files contain the model, if it is the text model of a larger one.

    Raises:
      InputError: a file or shard is missing, truncated or damaged; a tensor is missing, unused, misshapen or of a
        dtype that is not served. All headers are checked here, no data is read.
    """

    def __init__(self, folder: str | Path, model: Model, nesting: Nesting | None = None):
        self._folder = Path(folder)
        self._model = model
        self.files, entries = open_tensors(self._folder)
        self.stamps = FileStamps(self.files)
        self.nested_names: NestedNames | None = None
        self.carried: dict[str, Entry] = {}
        where = str(self._folder)
        if nesting is not None:
            self.nested_names = names_in(nesting, entries, where)
            entries, self.carried = self.nested_names.split(entries)
            where += f", text model ({self.nested_names.prefixes[0][0]}…)"
        self._names = tensor_names.names_of(model.config, "hugging_face")
        embedding, head = (self._names.name(path) for path in (self._names.embedding, self._names.head))
        if self._names.head not in model.outer_shapes() and embedding not in entries and head in entries:
            entries[embedding] = entries.pop(head)  # a tied checkpoint may hold either name
        shapes = {name: entry.shape for name, entry in entries.items()}
        names, tied_head = tensor_names.match_tensors(shapes, model, self._names, where)
        needed = parameter_shapes(model)
        self._entries = {
            path: entries[name].rows(tensor_names.rows_of(path, self._names, needed)) for path, name in names.items()
        }
        self._tied_head = entries[tied_head] if tied_head else None
        for entry in (*self._entries.values(), *([self._tied_head] if self._tied_head else [])):
            if entry.dtype.name not in _SERVED:
                raise InputError(
                    f"{entry.path}: tensor {entry.name} is {entry.dtype}; served are {', '.join(_SERVED)}; "
                    "convert it to one of these"
                )

    def load_block(self, i: int) -> Params:
        """Returns block i's tree in its stored dtypes, float64 as float32; kernels [d_in, d_out].

        Raises:
          InputError: NaN or infinity, or a float64 beyond float32; or a file was changed since it was opened.
        """
        prefix = f"{self._model.blocks_path}/{i}/"
        with self.stamps.held():
            return trees.unflatten({path: self._load(prefix + path) for path in self._model.block_shapes(i)})

    def load_outer(self) -> Params:
        """Returns embedding, last norm and, unless tied, the output head, in the dtypes of `load_block`.

        Raises:
          InputError: as `load_block`; or the config ties the output head, but the file has another one.
        """
        with self.stamps.held():
            outer = {path: self._load(path) for path in self._model.outer_shapes()}
            if self._tied_head and not np.array_equal(_read(self._tied_head), outer[self._names.embedding]):
                raise InputError(
                    f"{self._folder}: config.json says tie_word_embeddings, but {self._tied_head.name} differs from "
                    f"{self._entries[self._names.embedding].name}; correct the config"
                )
        return trees.unflatten(outer)

    def fingerprint(self) -> str:
        """Returns a digest of the files' names, sizes, modification times and headers, not of their data."""
        digest = hashlib.sha256(self.stamps.fingerprint())
        for path_name, entry in sorted(self._entries.items()):
            digest.update(f"{path_name} {entry.dtype} {entry.shape} {entry.path.name} {entry.offset}\n".encode())
        return digest.hexdigest()

    def _load(self, path: str) -> np.ndarray:
        """Returns a parameter, turned and checked by pieces: memory holds it and one piece at a time."""
        entry, turned = self._entries[path], tensor_names.is_transposed(path)
        array = np.empty(entry.shape[::-1] if turned else entry.shape, _in_memory(entry.dtype))
        stored, bad = array.T if turned else array, 0
        for where, piece in read_pieces(entry):
            with np.errstate(over="ignore"):
                stored[where] = piece
            bad += tensor_names.count_not_finite(stored[where])
        tensor_names.require_none(bad, array.size, entry.name, str(entry.path))
        return array


def _read(entry: Entry) -> np.ndarray:
    """Returns the tensor in its stored dtype, float64 as float32; what is too large for float32 becomes infinite."""
    with np.errstate(over="ignore"):
        return read_tensor(entry).astype(_in_memory(entry.dtype), copy=False)


def _in_memory(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def open_tensors(folder: Path) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    """Returns the safetensors files of a folder, with their index, and {tensor name: entry}.

    Raises:
      InputError: none is there, one is missing or damaged, or file and index disagree.
    """
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,), read_header(folder / _SINGLE)
    if (folder / _INDEX).is_file():
        return _open_shards(folder / _INDEX)
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pth")):
        raise InputError(
            f"{folder} has only pickled weights, which are never opened; convert them to safetensors first"
        )
    raise InputError(f"{folder} has neither {_SINGLE} nor {_INDEX}")


def _open_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map of tensor names to files")
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise InputError(f"{index} names the shard {shard!r}; a .safetensors file in the same folder is expected")
    files = tuple(index.parent / shard for shard in sorted(set(weight_map.values())))
    entries: dict[str, Entry] = {}
    for path in files:
        if not path.is_file():
            raise InputError(f"{index} names the shard {path.name}, which is missing; fetch it")
        for name, entry in read_header(path).items():
            if name in entries:
                raise InputError(f"tensor {name} is in two shards, {entries[name].path.name} and {path.name}")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].path.name != shard:
            raise InputError(f"{index} says that {shard} holds tensor {name}, which it does not; fetch both again")
    return (index, *files), entries
