"""`cluscomp import`: writes an AQLM model of one codebook per matrix as a compressed folder."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from cluscomp_jax import _version as version
from cluscomp_jax.checkpoint.reader import describe, save_checkpoint
from cluscomp_jax.cli.arguments import ImportArguments
from cluscomp_jax.cli.command_line import command_line
from cluscomp_jax.cli.folder import carried_tokenizer
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.open import open_aqlm, open_model
from cluscomp_jax.reporting.tables import format_bytes


@dataclasses.dataclass(frozen=True)
class _Imported:
    """Takes the place of a CompressConfig, since nothing was compressed."""

    model: Any

    def to_dict(self) -> dict[str, Any]:
        return {"imported": "aqlm"}


def run(arguments: ImportArguments) -> Result:
    """Returns what was imported; an interrupted import resumes when the same command is given again."""
    opened = open_model(arguments.model)
    if opened.kind != "aqlm":
        hint = "it is in our format already" if opened.kind == "compressed" else "`cluscomp compress` takes it"
        raise InputError(f"{arguments.model} is no AQLM model, which is all that import takes; {hint}")
    opened = open_aqlm(opened.files[0].parent, name=opened.name, allow_dense=arguments.allow_dense)
    tokenizer = carried_tokenizer(opened)
    provenance = {
        "model": opened.origin,
        "calibration": None,
        "tokenizer": tokenizer.digest,
        "versions": version.versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command_line(arguments),
    }
    config = _Imported(opened.config)
    save_checkpoint(arguments.out, opened.source, config, provenance=provenance, tokenizer=tokenizer.write)
    totals = describe(arguments.out)["totals"]
    bits = totals["bits_per_weight"]
    rate = "no compressed matrix" if bits is None else f"{totals['matrices']} matrices, {bits:.3f} bits per weight"
    text = f"{Path(arguments.out)}: {rate}, {totals['tensors']} other tensors, {format_bytes(totals['file_bytes'])}"
    return Result(text, {"out": arguments.out, "model": opened.name, **totals})
