"""Exports of a compressed checkpoint that others load: Hugging Face dense and AQLM, orbax.

Each is written one parameter at a time into a folder that appears whole or not at all, with a model card.
"""

from pathlib import Path
from typing import Literal

from cluscomp_jax.checkpoint.entries import DTYPES
from cluscomp_jax.checkpoint.new_folder import new_folder
from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.checkpoint.recorded import recorded
from cluscomp_jax.errors import InputError
from cluscomp_jax.export import hugging_face, orbax
from cluscomp_jax.export.card import model_card
from cluscomp_jax.export.format import ExportOptions, Format

ExportFormat = Literal["aqlm", "dense", "orbax", "orbax-codebook"]
FORMATS: dict[ExportFormat, Format] = {
    "aqlm": Format(hugging_face.write_aqlm, frozenset({"code_bits", "shard_bytes"}), hugging_face.AQLM_USAGE),
    "dense": Format(
        hugging_face.write_dense,
        frozenset({"dtype", "shard_bytes"}),
        hugging_face.DENSE_USAGE,
        hugging_face.NESTED_USAGE,
    ),
    "orbax": Format(orbax.write_orbax, frozenset({"dtype"}), orbax.USAGE),
    "orbax-codebook": Format(orbax.write_orbax_codebook, frozenset(), orbax.CODEBOOK_USAGE),
}
TEXT_ALONE = (
    "This is the text model alone. Its checkpoint has the tensors around it too, and so has its export as dense."
)


def export_checkpoint(
    source: CheckpointSource,
    out: str | Path,
    form: ExportFormat,
    *,
    dtype: str | None = None,
    code_bits: int | None = None,
    shard_bytes: int | None = None,
    command: str = "",
) -> list[Path]:
    """Writes an export and returns its files; one block of the checkpoint is in memory at a time.

    Args:
      source: an opened checkpoint.
      out: absent, or an empty folder.
      form: the format.
      dtype: see `ExportOptions`.
      code_bits: see `ExportOptions`.
      shard_bytes: see `ExportOptions`.
      command: recorded in the model card.

    Raises:
      InputError: the format cannot hold the checkpoint, an option has no effect on it, or `out` is taken.
      RunError: the disk is full or fails. No file is left.
    """
    options = ExportOptions(dtype, code_bits, shard_bytes)
    chosen = _checked(form, options)
    final = Path(out)
    with new_folder(final) as folder:
        chosen.write(source, folder, options)
        usage = chosen.usage
        if source.has_carried:
            usage = chosen.nested_usage or f"{TEXT_ALONE}\n\n{usage}"
        card = model_card(recorded(source.manifest.to_dict()), form=form, usage=usage, command=command)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return sorted(path for path in final.rglob("*") if path.is_file())


def _checked(form: ExportFormat, options: ExportOptions) -> Format:
    """Returns the format; raises InputError where it is unknown or an option is wrong or has no effect on it."""
    if form not in FORMATS:
        raise InputError(f"export format is {form!r}; it must be one of {', '.join(FORMATS)}")
    for name, value in options._asdict().items():
        if value is not None and name not in FORMATS[form].options:
            raise InputError(f"{name.replace('_', ' ')} {value} has no effect on {form}; leave it out")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InputError(f"dtype is {options.dtype!r}; it must be one of {', '.join(DTYPES)}")
    if options.shard_bytes is not None and options.shard_bytes < 1:
        raise InputError(f"shards of {options.shard_bytes} bytes hold nothing; give 1 or more")
    return FORMATS[form]
