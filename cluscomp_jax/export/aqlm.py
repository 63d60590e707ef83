"""AQLM's form of compressed kernels, for transformers' `quant_method` "aqlm": its scheme, tensors and refusals.

A Linear of PyTorch's weight [out, in] becomes, with out_group_size O and in_group_size I,

    codes      int8 (up to 8 bits) or int16 [out/O, in/I, 1], two's complement of the code's number
    codebooks  [1, 2**bits, O, I]
    scales     [out/O, 1, 1, 1], all one here

One (O, I, bits) serves the whole model, and there is no padding. Knows no files.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cluscomp_jax.checkpoint.entries import DTYPES, Entry, MatrixEntry
from cluscomp_jax.core import bitpack
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import MAX_GROUP, PLAIN, Axis, code_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.safetensors_writer import TensorSpec
from cluscomp_jax.models.tensor_names import TensorNames

_BROKEN_BITS = 8
"""aqlm 1.1.7 runs codebooks of 256 codes through a CPU kernel whose threads overwrite each other's sums."""


@dataclasses.dataclass(frozen=True)
class AqlmScheme:
    """What all Linears of one AQLM checkpoint share.

    Attributes:
      axis: the axis of the Flax kernel [d_in, d_out] that is cut: "out": O = g and I = 1; "in": O = 1 and I = g.
      g: weights per code.
      bits: of a code; every codebook is filled up with zeros to 2**bits rows.
      dense: Hugging Face modules of blocks that are not compressed.
      names: of the tensors in a Hugging Face folder.
    """

    axis: Axis
    g: int
    bits: int
    dense: tuple[str, ...]
    names: TensorNames

    @property
    def groups(self) -> tuple[int, int]:
        """(out_group_size, in_group_size)."""
        return (self.g, 1) if self.axis == "out" else (1, self.g)

    @property
    def code_dtype(self) -> np.dtype[Any]:
        """The dtype of codes."""
        return np.dtype(np.int8 if self.bits <= 8 else np.int16)

    def quantization_config(self) -> dict[str, Any]:
        """Returns the entry of config.json.

        Of a module that stays dense both spellings are needed: transformers 5 goes by the module's name, and
        replaces "lm_head" by a layer without weights where only "lm_head.weight" is given; others go by the latter.
        """
        out_group, in_group = self.groups
        kept = [spelling for module in ("lm_head", *self.dense) for spelling in (module, f"{module}.weight")]
        return {
            "quant_method": "aqlm",
            "nbits_per_codebook": self.bits,
            "num_codebooks": 1,
            "in_group_size": in_group,
            "out_group_size": out_group,
            "linear_weights_not_to_quantize": kept,
        }

    def specs(self, path: str, entry: MatrixEntry) -> list[TensorSpec]:
        """Returns what `tensors` will yield for a matrix."""
        (d_in, d_out), (out_group, in_group) = entry.shape, self.groups
        dtype = DTYPES[entry.codebook_dtype]
        shapes = {
            "codes": (self.code_dtype, (d_out // out_group, d_in // in_group, 1)),
            "codebooks": (dtype, (1, 2**self.bits, out_group, in_group)),
            "scales": (dtype, (d_out // out_group, 1, 1, 1)),
        }
        module = self.names.name(path).removesuffix(".weight")
        return [TensorSpec(f"{module}.{name}", *entry) for name, entry in shapes.items()]

    def tensors(self, leaf: CodebookArray) -> Iterator[np.ndarray]:
        """Yields codes, codebooks and scales of a matrix."""
        signed = np.asarray(leaf.index).T.astype(np.int32)
        signed[signed >= 2 ** (self.bits - 1)] -= 2**self.bits
        yield signed.astype(self.code_dtype)[..., None]
        codes = np.asarray(leaf.codebook)
        filled = np.zeros((2**self.bits, self.g), codes.dtype)
        filled[: len(codes)] = codes
        yield filled.reshape(1, 2**self.bits, *self.groups)
        yield np.ones((leaf.matrix_shape[1] // self.groups[0], 1, 1, 1), codes.dtype)


def scheme_of(entries: Mapping[str, Entry], names: TensorNames, *, bits: int | None = None) -> AqlmScheme:
    """Returns the scheme that holds all matrices of a checkpoint.

    Args:
      entries: {parameter path: entry}.
      names: of the tensors in a Hugging Face folder.
      bits: of a code, at most 16; None: as few as the matrices need, but never 8.

    Raises:
      InputError: no matrix is compressed, one is outside the blocks, two are cut differently, g does not divide a
        cut axis, or `bits` are too few, too many or 8.
    """
    matrices = {path: e for path, e in entries.items() if isinstance(e, MatrixEntry)}
    if not matrices:
        raise InputError("an AQLM checkpoint needs compressed matrices, and there is none; export it as dense")
    for path, entry in matrices.items():
        if entry.coding != PLAIN:
            raise InputError(
                f"{path} has an index of the coding {entry.coding.name!r}, and AQLM holds plain ones only: compress "
                "with --for aqlm, or export as dense"
            )
        if not path.startswith(f"{names.blocks_path}/"):
            raise InputError(f"{path} is compressed, and AQLM holds kernels of decoder blocks only; export it as dense")
    first_path, first = next(iter(matrices.items()))
    for path, entry in matrices.items():
        if (entry.axis, entry.group_size) != (first.axis, first.group_size):
            raise InputError(
                f"{path} has g={entry.group_size} along {entry.axis!r}, {first_path} has g={first.group_size} along "
                f"{first.axis!r}; AQLM has one g and axis for all: compress with --for aqlm, or export as dense"
            )
    _require_division(matrices)
    needed = max(1, *(code_bits(entry.num_codes) for entry in matrices.values()))
    if bits is None:
        bits = needed + (needed == _BROKEN_BITS)
    if not needed <= bits <= bitpack.MAX_BITS or bits == _BROKEN_BITS:
        raise InputError(
            f"AQLM codes of {bits} bits were asked for; the matrices need {needed}, at most {bitpack.MAX_BITS} are "
            f"possible, and {_BROKEN_BITS} give wrong sums in aqlm's CPU kernel"
        )
    kept = [path for path in entries if path.startswith(f"{names.blocks_path}/") and path.endswith("/kernel")]
    dense = [names.name(path).removesuffix(".weight") for path in kept if path not in matrices]
    return AqlmScheme(first.axis, first.group_size, bits, tuple(dense), names)


def _require_division(matrices: Mapping[str, MatrixEntry]) -> None:
    cut = {path: entry.shape[1 if entry.axis == "out" else 0] for path, entry in matrices.items()}
    for path, entry in matrices.items():
        if cut[path] % entry.group_size:
            fitting = [str(g) for g in range(1, MAX_GROUP + 1) if not any(side % g for side in cut.values())]
            raise InputError(
                f"{path}: g={entry.group_size} does not divide the {cut[path]} weights along {entry.axis!r}, and AQLM "
                f"has no padding; compress with g of {', '.join(fitting)} (--for aqlm chooses one), or export as dense"
            )
