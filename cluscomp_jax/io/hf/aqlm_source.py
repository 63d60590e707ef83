"""A Hugging Face folder of quant_method "aqlm" with one codebook per matrix, as a ParamSource of CodebookArrays.

AQLM multiplies every row of a decoded weight [out, in] by a scale; our format has none. Scales that are all alike
are folded into the codebook; others make the matrix dense, if the caller allows it. Knows no PyTorch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.checkpoint.entries import DTYPES
from cluscomp_jax.core import bitpack, codebook, coding, trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import MAX_GROUP, Axis
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.safetensors_file import Entry, read_tensor
from cluscomp_jax.io.hf.safetensors_source import open_tensors, parse_folder_config, quant_method
from cluscomp_jax.models import tensor_names
from cluscomp_jax.models.model import Model, build_model
from cluscomp_jax.runtime.file_stamps import FileStamps
from cluscomp_jax.runtime.json_files import read_object

_PARTS = ("codes", "codebooks", "scales")


def is_aqlm(folder: Path) -> bool:
    """Whether a folder's config.json says that its weights are AQLM's."""
    return (folder / "config.json").is_file() and quant_method(read_object(folder / "config.json")) == "aqlm"


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """The cut that all matrices share: the axis of the Flax kernel, weights per code, bits of a code."""

    axis: Axis
    g: int
    bits: int


class AqlmSource:
    """A ParamSource over an AQLM folder. All names and shapes are checked when it is made; no tensor is read.

    Attributes:
      files: the safetensors files, and the index where there is one.
      model: the Model of its config.
      model_config: the family's config.
    """

    def __init__(self, folder: str | Path, *, allow_dense: bool = True):
        """Opens the folder.

        Args:
          folder: of the model.
          allow_dense: whether a matrix whose scales differ may become a dense kernel; else reading it is refused.

        Raises:
          InputError: no AQLM folder, several codebooks per matrix, groups along both axes or of more than 32
            weights, codes of more than 16 bits, a tensor that is missing, unused or misshapen.
        """
        self._folder, self._allow_dense = Path(folder), allow_dense
        fields = read_object(self._folder / "config.json")
        if quant_method(fields) != "aqlm":
            raise InputError(f"{self._folder}: config.json has no quant_method 'aqlm'; give an AQLM model")
        self._scheme = _read_scheme(fields["quantization_config"], self._folder)
        plain = {name: value for name, value in fields.items() if name != "quantization_config"}
        self.model_config = parse_folder_config(self._folder, plain)
        self.model: Model = build_model(self.model_config)
        self.files, self._entries = open_tensors(self._folder)
        self._stamps = FileStamps(self.files)
        self._check_tensors()

    def load_block(self, i: int) -> Params:
        """Returns block i's tree: CodebookArrays, and dense arrays in their stored dtype.

        Raises:
          InputError: scales that differ where `allow_dense` is off, a damaged tensor, NaN or infinity; or a file was
            changed since it was opened.
        """
        prefix = f"{self.model.blocks_path}/{i}/"
        with self._stamps.held():
            return trees.unflatten({path: self._load(prefix + path) for path in self.model.block_shapes(i)})

    def load_outer(self) -> Params:
        """Returns the parameters outside the blocks, by full paths. Raises as `load_block` does."""
        with self._stamps.held():
            return trees.unflatten({path: self._load(path) for path in self.model.outer_shapes()})

    def fingerprint(self) -> str:
        """Returns a digest of config.json and of the files' names, sizes and modification times."""
        digest = hashlib.sha256(json.dumps(read_object(self._folder / "config.json"), sort_keys=True).encode())
        digest.update(self._stamps.fingerprint())
        return digest.hexdigest()

    def _check_tensors(self) -> None:
        """Holds the codes and their companions against the config; everything else is checked as a plain folder is."""
        shapes: dict[str, tuple[int, ...]] = {name: entry.shape for name, entry in self._entries.items()}
        groups = (self._scheme.g, 1) if self._scheme.axis == "out" else (1, self._scheme.g)
        for name in [name for name in shapes if name.endswith(".codes")]:
            module = name.removesuffix(".codes")
            missing = [part for part in _PARTS if f"{module}.{part}" not in shapes]
            if missing:
                raise InputError(f"{self._folder}: {module} has codes but no {missing[0]}; fetch the model again")
            outs, ins, _ = (*shapes[name], 0, 0, 0)[:3]
            want = {
                "codes": (outs, ins, 1),
                "codebooks": (1, 2**self._scheme.bits, *groups),
                "scales": (outs, 1, 1, 1),
            }
            for part, shape in want.items():
                found = shapes.pop(f"{module}.{part}")
                if found != shape:
                    raise InputError(
                        f"{self._folder}: {module}.{part} has shape {list(found)}, the config makes it {list(shape)}"
                    )
            if self._entries[name].dtype != np.dtype(np.int8 if self._scheme.bits <= 8 else np.int16):
                raise InputError(f"{self._folder}: {name} is {self._entries[name].dtype}; int8 or int16 is expected")
            if self._entries[f"{module}.codebooks"].dtype.name not in DTYPES:
                raise InputError(f"{self._folder}: {module}.codebooks is {self._entries[f'{module}.codebooks'].dtype}")
            shapes[f"{module}.weight"] = (outs * groups[0], ins * groups[1])
        self._names = tensor_names.names_of(self.model.config, "hugging_face")
        if self._names.fused:
            raise InputError(
                f"{self._folder}: AQLM models of {self.model_config.model_type}, which stores several matrices as one, "
                "are not read; give the original model"
            )
        tensor_names.match_tensors(shapes, self.model, self._names, str(self._folder))

    def _load(self, path: str) -> Any:
        name = self._names.name(path)
        if name in self._entries:
            return tensor_names.to_flax(path, self._read(self._entries[name]))
        module = name.removesuffix(".weight")
        codes, codebooks, scales = (self._read(self._entries[f"{module}.{part}"]) for part in _PARTS)
        return self._matrix(path, codes[..., 0], codebooks.reshape(-1, self._scheme.g), scales.reshape(-1))

    def _matrix(self, path: str, codes: np.ndarray, table: np.ndarray, scales: np.ndarray) -> Any:
        """Returns a kernel of codes [out/O, in/I], codes' vectors [n, g] and scales [out/O]."""
        groups = (self._scheme.g, 1) if self._scheme.axis == "out" else (1, self._scheme.g)
        shape = (codes.shape[1] * groups[1], codes.shape[0] * groups[0])
        unsigned = codes.T.astype(np.int32) % 2**self._scheme.bits
        table = table[: int(unsigned.max()) + 1]  # what follows the last code in use is padding
        index = np.ascontiguousarray(unsigned.astype(coding.index_dtype(len(table))))
        if (scales == scales[0]).all():
            scaled = (
                table if scales[0] == 1 else _cast(table.astype(np.float32) * np.float32(scales[0]), table.dtype, path)
            )
            return codebook.validate(CodebookArray(scaled, index, shape, self._scheme.axis), path)
        if not self._allow_dense:
            raise InputError(
                f"{path}: its rows have scales from {float(scales.min()):g} to {float(scales.max()):g}, which a "
                "codebook alone cannot hold; --allow-dense stores such matrices decoded, without compression"
            )
        decoded = np.asarray(codebook.decode(CodebookArray(table, index, shape, self._scheme.axis)))
        rows = np.repeat(scales.astype(np.float32), groups[0])
        return _cast(decoded.astype(np.float32) * rows, table.dtype, path)

    def _read(self, entry: Entry) -> np.ndarray:
        array = read_tensor(entry)
        if array.dtype.kind != "i":
            tensor_names.require_finite(array, entry.name, str(entry.path))
        return array.astype(np.float32) if array.dtype == np.float64 else array


def _read_scheme(fields: Any, folder: Path) -> _Scheme:
    names = ("nbits_per_codebook", "num_codebooks", "in_group_size", "out_group_size")
    values = {name: fields.get(name) if isinstance(fields, Mapping) else None for name in names}
    if not all(type(value) is int and value > 0 for value in values.values()):
        raise InputError(f"{folder}: quantization_config has {values}; whole numbers above 0 are expected")
    bits, books, in_group, out_group = (int(value or 0) for value in values.values())
    if books != 1:
        raise InputError(f"{folder}: {books} codebooks per matrix; only AQLM models of one codebook can be read")
    if bits > bitpack.MAX_BITS:
        raise InputError(f"{folder}: codes of {bits} bits; at most {bitpack.MAX_BITS} can be read")
    if min(in_group, out_group) > 1 or max(in_group, out_group) > MAX_GROUP:
        raise InputError(
            f"{folder}: groups of {out_group} x {in_group} weights; one side must be 1, the other at most {MAX_GROUP}"
        )
    return _Scheme("out" if out_group > 1 else "in", max(in_group, out_group), bits)


def _cast(values: np.ndarray, dtype: np.dtype[Any], path: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.isfinite(cast).all():
        raise InputError(
            f"{path}: scales take its weights to {np.abs(values).max():g}, beyond the range of {dtype.name}"
        )
    return cast
