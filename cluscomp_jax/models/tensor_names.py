"""How a file format names the tensors of a decoder family, and whether a file has those that a model needs.

Knows no family: each has its own tables (`models/llama/names.py`), and the Model says which tensors there are.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model, family_of, parameter_shapes


@dataclass(frozen=True)
class TensorNames:
    """One naming of a family's tensors. Invariant: `p in paths(name(p))` for every path of the family.

    Attributes:
      blocks_path: the Flax path of the blocks, e.g. "model/layers".
      block_prefix: what precedes a block's number in a stored name, e.g. "model.layers.".
      block: {Flax module: (stored module, Flax name of its stored "weight")} inside a block; "*" in both stands for
        the number of an expert.
      outer: the same outside the blocks.
      head: path of the output head, which is not stored, or stored in vain, where embeddings are tied.
      embedding: path of the embeddings.
      ignorable: a pattern of stored names that carry no parameter of ours and may be passed over.
      fused: {stored module inside a block: Flax modules whose outputs it has one after another}. Such a tensor is read
        part by part, and written when all its parts are there.
      interleaved: the model types whose rows of q and k have the two halves of a head in turn: llama.cpp's order for
        its rotary embedding.
    """

    blocks_path: str
    block_prefix: str
    block: Mapping[str, tuple[str, str]]
    outer: Mapping[str, tuple[str, str]]
    head: str
    embedding: str
    ignorable: re.Pattern[str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: tuple[str, ...] = ()

    def name(self, path: str) -> str:
        """Returns the stored name of a Flax path.

        Raises:
          InputError: the path is in no row of the table.
        """
        module, _, leaf = path.rpartition("/")
        prefix, table = "", self.outer
        if module.startswith(f"{self.blocks_path}/"):
            number, _, module = module.removeprefix(f"{self.blocks_path}/").partition("/")
            prefix, table = f"{self.block_prefix}{number}.", self.block
        expert, module = _without_number(module, "/")
        if module not in table or leaf not in (table[module][1], "bias"):
            raise InputError(f"parameter path {path!r} has no known stored name")
        stored = table[module][0] if table is self.outer else self._fused_with(module) or table[module][0]
        return f"{prefix}{stored.replace('*', expert)}.{'bias' if leaf == 'bias' else 'weight'}"

    def paths(self, name: str) -> tuple[str, ...]:
        """Returns the Flax paths whose parameters a stored tensor has, in their order; none where it is not known."""
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(re.escape(self.block_prefix) + r"(0|[1-9]\d*)\.(.+)", module)
        parts = self.fused.get(match[2], ()) if match else ()
        if match is None or not parts or leaf not in ("weight", "bias"):
            path = self.path(name)
            return () if path is None else (path,)
        prefix = f"{self.blocks_path}/{match[1]}/"
        return tuple(f"{prefix}{part}/{'bias' if leaf == 'bias' else self.block[part][1]}" for part in parts)

    def _fused_with(self, module: str) -> str | None:
        return next((stored for stored, parts in self.fused.items() if module in parts), None)

    def path(self, name: str) -> str | None:
        """Returns the Flax path of a stored name, or None where the table has no such name or it is fused."""
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(re.escape(self.block_prefix) + r"(0|[1-9]\d*)\.(.+)", module)
        expert, module = _without_number(match[2] if match else module, ".")
        table = self.block if match else self.outer
        found = next(((flax, weight) for flax, (stored, weight) in table.items() if stored == module), None)
        if found is None or (match and self._fused_with(found[0])) or leaf not in ("weight", "bias"):
            return None
        prefix = f"{self.blocks_path}/{match[1]}/" if match else ""
        return f"{prefix}{found[0].replace('*', expert)}/{'bias' if leaf == 'bias' else found[1]}"


def _without_number(module: str, separator: str) -> tuple[str, str]:
    """Returns (the number of an expert in a module's name, or "", and the name with "*" for it)."""
    parts = module.split(separator)
    numbers = [part for part in parts if re.fullmatch(r"0|[1-9]\d*", part)]
    return (numbers[0] if numbers else ""), separator.join("*" if part in numbers else part for part in parts)


def names_of(config: Any, form: Literal["hugging_face", "gguf"]) -> TensorNames:
    """Returns how files of a form name the tensors of the family that a model config belongs to.

    Raises:
      InputError: the family has no such files.
    """
    model_type = getattr(config, "model_type", None)
    tables: Mapping[str, TensorNames] = getattr(family_of(model_type), "TENSOR_NAMES", {})
    if form not in tables:
        raise InputError(f"model_type {model_type!r} has no table of the tensors of {form} files")
    return tables[form]


def fused_modules(config: Any) -> tuple[str, ...]:
    """Returns the modules of Hugging Face folders that join several matrices; none where the family has no table."""
    try:
        return tuple(names_of(config, "hugging_face").fused)
    except InputError:
        return ()


def refuse_fused_aqlm(config: Any) -> None:
    """Raises InputError where matrices that have a codebook each here are one tensor there: AQLM cannot hold them."""
    if getattr(config, "experts", None) is not None:
        raise InputError(
            f"{config.model_type} is a mixture of experts, whose matrices are one tensor in transformers, which AQLM "
            "cannot hold; compress it for another form, and export it as dense"
        )
    if fused := fused_modules(config):
        raise InputError(
            f"{config.model_type} stores several matrices as one ({', '.join(fused)}), and each of them has a codebook "
            "of its own here, which AQLM cannot hold; compress it for another form, and export it as dense"
        )


def is_transposed(path: str) -> bool:
    """Returns whether a parameter is stored [d_out, d_in] where Flax has [d_in, d_out]."""
    return path.endswith("/kernel")


def to_flax(path: str, stored: np.ndarray) -> np.ndarray:
    """Returns a stored tensor in Flax orientation, contiguous; kernels [d_out, d_in] -> [d_in, d_out]."""
    return np.ascontiguousarray(stored.T) if is_transposed(path) else stored


def stored_shape(paths: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of the stored tensor that has the parameters at `paths`, one after another along its rows.

    Args:
      paths: of `TensorNames.paths`; of one row length.
      shapes: {path: shape} in Flax orientation.
    """
    parts = [shapes[path][::-1] if is_transposed(path) else shapes[path] for path in paths]
    return tuple(parts[0]) if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])


def rows_of(path: str, names: TensorNames, shapes: Mapping[str, tuple[int, ...]]) -> slice:
    """Returns which rows of its stored tensor a parameter is; all of them unless the tensor is fused.

    Args:
      path: of the parameter.
      names: the naming of the file.
      shapes: {path: shape} in Flax orientation.
    """
    paths = names.paths(names.name(path))
    first = sum(stored_shape([part], shapes)[0] for part in paths[: paths.index(path)])
    return slice(first, first + stored_shape([path], shapes)[0])


def match_tensors(
    found: Mapping[str, Iterable[int]], model: Model, tensor_names: TensorNames, where: str
) -> tuple[dict[str, str], str | None]:
    """Holds the tensors of a file against what the model needs.

    Args:
      found: {stored name: shape in row-major order}, as the file has them.
      model: says which parameters there must be, and their shapes.
      tensor_names: the naming of the file.
      where: the file or folder, for errors.

    Returns:
      ({Flax path: stored name} of every parameter, the stored name of an output head
      that is stored although embeddings are tied, or None).

    Raises:
      InputError: a tensor is missing, unused or of another shape; the line names it.
    """
    expected = parameter_shapes(model)
    names: dict[str, str] = {}
    tied_head = None
    for name, stored in found.items():
        if tensor_names.ignorable.fullmatch(name):
            continue
        paths = tensor_names.paths(name)
        if paths == (tensor_names.head,) and tensor_names.head not in expected:
            tied_head = name
            continue
        if not paths or any(path not in expected for path in paths):
            raise InputError(
                f"{where}: tensor {name} {list(stored)} is used by nothing; do config and file belong together?"
            )
        want = stored_shape(paths, expected)
        if tuple(stored) != want:
            raise InputError(f"{where}: tensor {name} has shape {list(stored)}, the model config needs {list(want)}")
        names |= dict.fromkeys(paths, name)
    missing = list(dict.fromkeys(tensor_names.name(path) for path in expected if path not in names))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{where}: tensor {missing[0]}{more} is missing; the model config needs it")
    return names, tied_head


def require_finite(array: np.ndarray, name: str, where: str) -> None:
    """Raises InputError naming the tensor if any value is NaN or infinite."""
    require_none(count_not_finite(array), array.size, name, where)


def count_not_finite(array: np.ndarray) -> int:
    """Returns how many values are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def require_none(bad: int, size: int, name: str, where: str) -> None:
    """Raises InputError naming the tensor of `size` values where `bad` of them, NaN or infinite, are not 0."""
    if bad:
        raise InputError(f"{where}: tensor {name} holds {bad} NaN or infinite values of {size}; fetch it again")
