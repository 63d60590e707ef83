"""The model card of an export: README.md with what the checkpoint records of itself. Measures nothing."""

import json
from collections.abc import Mapping
from typing import Any

from cluscomp_jax import _version as version
from cluscomp_jax.reporting.tables import format_bytes, format_table


def model_card(manifest: Mapping[str, Any], *, form: str, usage: str, command: str) -> str:
    """Returns the text of README.md.

    Args:
      manifest: of the checkpoint, as `recorded` returns it.
      form: the name of the export's format.
      usage: how to load it.
      command: the command line that exported.
    """
    provenance, totals, metrics = manifest["provenance"], manifest["totals"], manifest["metrics"]
    origin = provenance.get("model") or {}
    name = str(origin.get("name", "unknown"))
    front = ["---", *([f"base_model: {name}"] if name.count("/") == 1 else []), "tags: [cluscomp, compressed]", "---"]
    sections = [
        "\n".join(front),
        f"# {name}, compressed by clustering\n\nMade by cluscomp_jax (ClusComp, arXiv 2503.13089); format: {form}.",
        "## Use\n\n" + usage,
        "## What it is\n\n```\n" + _facts(origin, totals, provenance) + "\n```",
    ]
    measured = metrics.get("perplexity") or {}
    if measured:
        rows = [
            (which, f"{m['perplexity']:.4f}", f"{m['windows']} x {m['context']}")
            for which, m in measured.items()
            if m["perplexity"] is not None
        ]
        sections.append("## Perplexity\n\n```\n" + format_table(("model", "perplexity", "tokens"), rows) + "\n```")
    made = provenance.get("command")
    lines = [*([str(made)] if made else []), command]
    settings = json.dumps(manifest["run_config"], indent=1)
    versions = provenance.get("versions") or {}
    now = {f"export: {name}": v for name, v in version.versions().items() if versions.get(name) != v}
    sections += [
        "## Made by\n\n```\n" + "\n".join(lines) + "\n```",
        f"Settings:\n\n```json\n{settings}\n```",
        "Versions: " + ", ".join(f"{name} {v}" for name, v in {**versions, **now}.items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(origin: Mapping[str, Any], totals: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    rows = [("base model", f"{origin.get('name', 'unknown')} ({origin.get('kind', 'unknown')})")]
    if totals["bits_per_weight"] is not None:
        rows.append(("bits per weight", f"{totals['bits_per_weight']:.3f}, codebooks included"))
    rows += [
        ("compressed matrices", f"{totals['matrices']}, {totals['matrix_weights']:,} weights"),
        ("other parameters", f"{totals['tensor_weights']:,} weights, {format_bytes(totals['tensor_bytes'])}"),
        ("compressed size", format_bytes(totals["matrix_bits"] / 8 + totals["tensor_bytes"])),
    ]
    calibration = provenance.get("calibration")
    if calibration:
        samples, length = calibration["shape"]
        what = "positions of embeddings" if calibration.get("kind") == "embeddings" else "tokens"
        rows.append(("calibration", f"{calibration['name']}, {samples} x {length} {what}"))
    else:
        rows.append(("calibration", "none"))
    return format_table(("what", "value"), rows)
