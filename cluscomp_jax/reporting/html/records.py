"""The records of a run, finished or not, in one form for figures and pages. Reads no parameters."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.evaluations import STAGES, read_evaluations, stage_of, stages_until
from cluscomp_jax.checkpoint.manifest import MANIFEST_NAME
from cluscomp_jax.checkpoint.reader import describe
from cluscomp_jax.checkpoint.recorded import recorded
from cluscomp_jax.checkpoint.run_folder import RUN_NAME
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import build_model, parse_model_config
from cluscomp_jax.runtime import json_files

METRICS_NAME = "metrics.jsonl"
_DENSE_BITS = 16
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """The records of one run.

    Attributes:
      folder: the run's folder, as it was given.
      name: the folder's own name.
      finished: whether the run ended. An unfinished run has the blocks and matrices done so far.
      num_blocks: number of blocks of the model.
      blocks_path: the path that the paths of all blocks begin with, e.g. "model/layers".
      model_config, run_config, provenance: as in the manifest; provenance is empty while the run is unfinished.
      totals: as in the manifest; None while unfinished.
      matrices: one record per compressed matrix: path, shape, g, num_codes, axis, bits, bits_per_weight and, where the
        run recorded them, relative_error and seconds.
      blocks: one record per block: index and, where the block was tuned, loss_before, epoch_losses and loss_after.
      stages: {stage: {"seconds", "peak_rss_bytes"}}.
      perplexity: {stage: the record of a measurement}, in the order of stages; all of one text and context.
      stage: the stage of this checkpoint; None while the run is unfinished.
      unmeasured: the stages of this checkpoint's past without a recorded measurement.
      seconds, peak_rss_bytes: of the whole run; None where unknown.
    """

    folder: str
    name: str
    finished: bool
    num_blocks: int
    blocks_path: str
    model_config: Record
    run_config: Record
    provenance: Record
    totals: Record | None
    matrices: Sequence[Record]
    blocks: Sequence[Record]
    stages: Mapping[str, Record]
    perplexity: Mapping[str, Record]
    stage: str | None
    unmeasured: Sequence[str]
    seconds: float | None
    peak_rss_bytes: int | None

    @property
    def origin(self) -> str:
        """The name of the original model."""
        return str((self.provenance.get("model") or {}).get("name", "unknown"))

    @property
    def own_perplexity(self) -> Record:
        """The measurement of this checkpoint itself, or an empty record."""
        return self.perplexity.get(self.stage or "", {})

    @property
    def resolved_config(self) -> Record:
        """`run_config` with the settings that ran: under a bit budget, each rule names what the budget gave it.

        A rule whose matrices have several settings appears once for each, with the number of its matrices under
        "matrices". A rule without any matrix so far has neither "group_size" nor "num_codes".
        """
        cluster = self.run_config.get("cluster") or {}
        if cluster.get("bits") is None:
            return self.run_config
        left, rules = list(self.matrices), list[dict[str, Any]]()
        for rule in cluster["rules"]:
            matched = re.compile(rule["pattern"]).fullmatch
            rules += _resolved(rule, [matrix for matrix in left if matched(matrix["path"])])
            left = [matrix for matrix in left if not matched(matrix["path"])]
        return {**self.run_config, "cluster": {**cluster, "rules": rules}}

    def projection(self, path: str) -> str:
        """Returns the part of a matrix's path that is the same in all blocks, e.g. "mlp/up_proj"."""
        inside = path.removeprefix(f"{self.blocks_path}/")
        name = inside.partition("/")[2] if inside != path else path
        return name.removesuffix("/kernel")

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits over weights of the matrices so far; None without any."""
        weights = sum(math.prod(matrix["shape"]) for matrix in self.matrices)
        return float(sum(matrix["bits"] for matrix in self.matrices)) / weights if weights else None

    @property
    def matrix_bytes(self) -> tuple[float, float]:
        """(as 16-bit numbers, compressed) of the matrices so far."""
        weights = sum(math.prod(matrix["shape"]) for matrix in self.matrices)
        return weights * _DENSE_BITS / 8, sum(matrix["bits"] for matrix in self.matrices) / 8


def _resolved(rule: Record, matrices: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns the rule once for each (g, num_codes, step_bits) that its matrices have, most matrices first."""
    kept = {key: value for key, value in rule.items() if key not in ("group_size", "g", "num_codes", "step_bits")}
    counts = Counter((matrix["g"], matrix["num_codes"], matrix.get("step_bits")) for matrix in matrices)
    found = []
    for (g, n, step_bits), count in counts.most_common():
        trellis = {} if step_bits is None else {"step_bits": step_bits}
        found.append({**kept, "group_size": g, "num_codes": n, **trellis, "matrices": count})
    return found or [kept]


def read_records(folder: str | Path) -> ReportedRun:
    """Returns the records of a compressed folder, or of a run that has not ended.

    Raises:
      InputError: the folder is neither, or a file of it is damaged.
    """
    path = Path(folder)
    if (path / MANIFEST_NAME).is_file():
        return _finished(path)
    if (path / RUN_NAME).is_file():
        return _unfinished(path)
    raise InputError(f"{path}: has neither {MANIFEST_NAME} nor {RUN_NAME}; give the output folder of compress")


def _finished(path: Path) -> ReportedRun:
    manifest = recorded(describe(path))
    metrics = manifest["metrics"]
    of_run = {matrix["path"]: matrix for matrix in metrics.get("matrices") or []}
    listed = manifest["matrices"]
    order = [*of_run, *(name for name in listed if name not in of_run)]  # the manifest's own order means nothing
    matrices = [{**_of_manifest(name, listed[name]), **of_run.get(name, {})} for name in order if name in listed]
    model = build_model(parse_model_config(manifest["model_config"]))
    perplexity = _perplexity(manifest, read_evaluations(path))
    return ReportedRun(
        folder=str(path),
        name=path.resolve().name,
        finished=True,
        num_blocks=model.num_blocks,
        blocks_path=model.blocks_path,
        model_config=manifest["model_config"],
        run_config=manifest["run_config"],
        provenance=manifest["provenance"],
        totals=manifest["totals"],
        matrices=matrices,
        blocks=metrics.get("blocks") or [],
        stages=metrics.get("stages") or {},
        perplexity=perplexity,
        stage=stage_of(manifest),
        unmeasured=[stage for stage in stages_until(manifest) if stage not in perplexity],
        seconds=metrics.get("seconds"),
        peak_rss_bytes=metrics.get("peak_rss_bytes"),
    )


def _perplexity(manifest: Record, noted: Sequence[Record]) -> dict[str, Record]:
    """Returns {stage: measurement} on the text and context that most stages were measured on, of those the latest."""
    own = stage_of(manifest)
    of_run = manifest["metrics"].get("perplexity") or {}
    measured = [{**m, "stage": own if which == "compressed" else which} for which, m in of_run.items()]
    texts: dict[object, dict[str, Record]] = {}
    for record in (*measured, *noted):
        text = (record.get("digest"), record.get("windows"), record.get("context"))
        texts.setdefault(text, {})[record["stage"]] = record
    most = max(reversed(texts.values()), key=len, default={})
    return {stage: most[stage] for stage in STAGES if stage in most}


def _of_manifest(name: str, matrix: Record) -> dict[str, Any]:
    """Returns the manifest's entry of a matrix under the keys of a run's records."""
    return {
        "path": name,
        "shape": matrix["shape"],
        "axis": matrix["axis"],
        "g": matrix["group_size"],
        "num_codes": matrix["num_codes"],
        "step_bits": matrix.get("step_bits"),
        "bits": round(matrix["bits_per_weight"] * math.prod(matrix["shape"])),
        "bits_per_weight": matrix["bits_per_weight"],
    }


def _unfinished(path: Path) -> ReportedRun:
    run = json_files.read_object(path / RUN_NAME)
    model_config, run_config = run.get("model_config"), run.get("run_config")
    if not isinstance(model_config, dict) or not isinstance(run_config, dict):
        raise InputError(f"{path / RUN_NAME}: lacks the configs of its run; it is damaged")
    model = build_model(parse_model_config(model_config))
    blocks = {record["index"]: record for record in _block_events(path / METRICS_NAME)}
    ordered = [blocks[i] for i in sorted(blocks)]
    return ReportedRun(
        folder=str(path),
        name=path.resolve().name,
        finished=False,
        num_blocks=model.num_blocks,
        blocks_path=model.blocks_path,
        model_config=model_config,
        run_config=run_config,
        provenance={},
        totals=None,
        matrices=[matrix for block in ordered for matrix in block.get("matrices", [])],
        blocks=ordered,
        stages={},
        perplexity={},
        stage=None,
        unmeasured=[],
        seconds=None,
        peak_rss_bytes=None,
    )


def _block_events(path: Path) -> list[dict[str, Any]]:
    """Returns the records of blocks in a metrics file; an incomplete last line (a killed process) is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number}: not JSON ({error}); the file is damaged") from None
        if isinstance(event, dict) and event.get("event") == "block" and isinstance(event.get("index"), int):
            events.append(event)
    return events
