"""`cluscomp inspect`: the records of a compressed folder, or the matrices of a tree that `cluscomp_jax.save` wrote."""

from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.evaluations import read_evaluations
from cluscomp_jax.checkpoint.reader import describe, open_checkpoint
from cluscomp_jax.checkpoint.recorded import recorded
from cluscomp_jax.checkpoint.saved_trees import describe_tree, verify_tree
from cluscomp_jax.cli.arguments import InspectArguments
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.reporting.tables import MATRIX_HEADER, format_bytes, format_codes, format_table, matrix_rows
from cluscomp_jax.runtime.reporter import to_json


def run(arguments: InspectArguments) -> Result:
    """Returns the checkpoint's manifest, or tree.json; with --verify every file has been read and compared first."""
    tree = describe_tree(arguments.model)
    if tree is not None:
        return _run_tree(arguments, tree)
    if arguments.verify:
        open_checkpoint(arguments.model, verify=True)
    manifest = describe(arguments.model)
    known = recorded(manifest)
    lines = [
        *_summary(known, Path(arguments.model)),
        "",
        _matrices(known),
        "",
        "settings:   " + to_json(manifest["run_config"]),
    ]
    lines.append("provenance: " + to_json(manifest["provenance"]))
    if arguments.verify:
        lines.append(f"verified:   {len(manifest['files'])} files have the sizes and checksums of the manifest")
    return Result("\n".join(lines), manifest)


def _run_tree(arguments: InspectArguments, tree: dict[str, Any]) -> Result:
    totals, bits = tree["totals"], tree["totals"]["bits_per_weight"]
    rows = [
        (
            path,
            "x".join(map(str, m["shape"])),
            "x".join(map(str, m.get("stack", []))),
            m["group_size"],
            format_codes(m),
            m["axis"],
            f"{m['bits_per_weight']:.3f}",
        )
        for path, m in tree["matrices"].items()
    ]
    lines = [
        f"size:       {format_bytes(totals['file_bytes'])} on disk",
        f"kernels:    {totals['matrices']} of {totals['matrix_weights']:,} weights"
        + (f" at {bits:.3f} bits per weight, codebooks included" if bits is not None else ""),
        f"other:      {totals['tensors']} arrays, {format_bytes(totals['tensor_bytes'])}",
        "",
        format_table(("kernel", "matrix", "stack", "g", "codes", "axis", "bits/weight"), rows),
    ]
    if arguments.verify:
        verify_tree(arguments.model)
        lines.append(f"verified:   {len(tree['files'])} files have the sizes and checksums of tree.json")
    return Result("\n".join(lines), tree)


def _records(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the records of the matrices, or nothing where the run left none or an older kind."""
    records: list[dict[str, Any]] = manifest["metrics"].get("matrices") or []
    return records if all(matrix.get("relative_error") is not None for matrix in records) else []


def _summary(manifest: dict[str, Any], folder: Path) -> list[str]:
    totals, config = manifest["totals"], manifest["model_config"]
    bits = totals["bits_per_weight"]
    lines = [
        f"model:      {config['model_type']} of {config.get('num_hidden_layers')} blocks",
        f"size:       {format_bytes(totals['file_bytes'])} on disk",
        f"matrices:   {totals['matrices']} of {totals['matrix_weights']:,} weights"
        + (f" at {bits:.3f} bits per weight, codebooks included" if bits is not None else ""),
        f"other:      {totals['tensors']} tensors, {format_bytes(totals['tensor_bytes'])}",
    ]
    if carried := [file["size"] for name, file in manifest["files"].items() if name.startswith("carried/")]:
        lines.append(f"carried:    {format_bytes(sum(carried))} around the text model, as they were")
    for name, measured in manifest["metrics"].get("perplexity", {}).items():
        value = measured["perplexity"]
        lines.append(f"perplexity: {'not finite' if value is None else format(value, '.4f')} {name}")
    lines += [
        f"perplexity: {noted['perplexity']:.4f} {noted['stage']}, noted from {noted['text']} "
        f"in {noted['windows']} windows of {noted['context']}"
        for noted in read_evaluations(folder)
    ]
    return lines


def _matrices(manifest: dict[str, Any]) -> str:
    """Returns the table of all matrices; errors are known where the run recorded them."""
    if records := _records(manifest):
        return format_table(MATRIX_HEADER, matrix_rows(records))
    rows = [
        (path, "x".join(map(str, m["shape"])), m["group_size"], format_codes(m), m["axis"])
        for path, m in manifest["matrices"].items()
    ]
    return format_table(MATRIX_HEADER[:5], rows)
