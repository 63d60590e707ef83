"""Perplexities that were measured after a run, kept next to its checkpoint in evaluations.jsonl. Measures nothing.

A record is a measurement (see `cluscomp_jax.evaluation.perplexity.Perplexity`) with the stage and the name of what was
measured.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime import atomic

EVALUATIONS_NAME = "evaluations.jsonl"
STAGES = ("original", "clustered", "corrected", "tuned", "imported", "finetuned")
"""What a model may have gone through, in order; a checkpoint is named by the last."""


def stage_of(manifest: Mapping[str, Any]) -> str:
    """Returns which of STAGES a finished checkpoint has reached, by what its manifest says of its run."""
    settings = manifest["run_config"]
    if "finetune" in settings:
        return "finetuned"
    if "imported" in settings:
        return "imported"
    if not manifest["provenance"].get("calibration"):
        return "clustered"
    if settings.get("tuning"):
        return "tuned"
    return "corrected" if _corrects(settings) else "clustered"


def _corrects(settings: Mapping[str, Any]) -> bool:
    cluster = settings.get("cluster") or {}
    return bool(cluster.get("drift_correction", cluster.get("correction")))  # named so in older manifests


def stages_until(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the stages that a checkpoint has gone through, as far as its own manifest says, its own last."""
    own, settings = stage_of(manifest), manifest["run_config"]
    if own in ("imported", "finetuned"):
        return ("original", own)
    corrected = _corrects(settings) and own != "clustered"
    passed = ("original", "clustered", *(["corrected"] if corrected else []), own)
    return tuple(dict.fromkeys(passed))


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the records next to a checkpoint, oldest first.

    Raises:
      InputError: the file is damaged.
    """
    path = folder / EVALUATIONS_NAME
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.get("stage") not in STAGES or not _is_measured(record):
            raise InputError(f"{path} line {number}: is no record of an evaluation; mend or remove the line")
        records.append(record)
    return records


def _is_measured(record: Mapping[str, Any]) -> bool:
    numbers = (record.get("perplexity"), record.get("windows"), record.get("context"), record.get("tokens"))
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)


def add_evaluation(folder: Path, record: Mapping[str, Any]) -> Path:
    """Adds a record to those next to a checkpoint, and returns their file; it is replaced whole or not at all.

    Raises:
      InputError: the file there is damaged.
      RunError: the disk is full, or refuses to be written to.
    """
    path = folder / EVALUATIONS_NAME
    lines = [json.dumps(entry) for entry in (*read_evaluations(folder), dict(record))]
    with atomic.writing(path):
        atomic.write_text(path, "".join(f"{line}\n" for line in lines), aside=path.with_name(f"{path.name}.writing"))
    return path
