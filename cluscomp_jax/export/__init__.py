"""Exports of a compressed checkpoint that others load: Hugging Face dense and AQLM, orbax.

Each is written one parameter at a time into a folder that appears whole or not at all, with a model card.
"""

from pathlib import Path
from typing import Literal, get_args

from cluscomp_jax.checkpoint.entries import DTYPES
from cluscomp_jax.checkpoint.new_folder import new_folder
from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.errors import InputError
from cluscomp_jax.export import hugging_face, orbax
from cluscomp_jax.export.card import model_card

ExportFormat = Literal["aqlm", "dense", "orbax", "orbax-codebook"]
_WITH_DTYPE = ("dense", "orbax")
DEFAULT_SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one safetensors file."""


def export_checkpoint(
    source: CheckpointSource,
    out: str | Path,
    form: ExportFormat,
    *,
    dtype: str | None = None,
    code_bits: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    command: str = "",
) -> list[Path]:
    """Writes an export and returns its files; one block of the checkpoint is in memory at a time.

    Args:
      source: an opened checkpoint.
      out: absent, or an empty folder.
      form: the format.
      dtype: "float32", "float16" or "bfloat16" for all tensors of a decoded format; None: each in its own.
      code_bits: of an AQLM code, see `aqlm.scheme_of`.
      shard_bytes: most bytes of tensors in one safetensors file; above 0.
      command: recorded in the model card.

    Raises:
      InputError: the format cannot hold the checkpoint, an option has no effect on it, or `out` is taken.
      RunError: the disk is full or fails. No file is left.
    """
    if form not in get_args(ExportFormat):
        raise InputError(f"export format is {form!r}; it must be one of {', '.join(get_args(ExportFormat))}")
    if dtype is not None and form not in _WITH_DTYPE:
        raise InputError(f"dtype {dtype} has no effect on {form}, which keeps the codebooks' own; leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if code_bits is not None and form != "aqlm":
        raise InputError(f"code bits {code_bits} have no effect on {form}; leave them out")
    if shard_bytes < 1:
        raise InputError(f"shards of {shard_bytes} bytes hold nothing; give 1 or more")
    final = Path(out)
    with new_folder(final) as folder:
        match form:
            case "dense":
                hugging_face.write_dense(source, folder, dtype=dtype, shard_bytes=shard_bytes)
            case "aqlm":
                hugging_face.write_aqlm(source, folder, bits=code_bits, shard_bytes=shard_bytes)
            case "orbax":
                orbax.write_orbax(source, folder, dtype=dtype)
            case "orbax-codebook":
                orbax.write_orbax_codebook(source, folder)
        card = model_card(source.manifest.to_dict(), form=form, command=command)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return sorted(path for path in final.rglob("*") if path.is_file())
