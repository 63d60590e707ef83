"""`cluscomp export`: a compressed folder in a form that other programs load."""

import time
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.cli.arguments import ExportArguments
from cluscomp_jax.cli.command_line import command_line
from cluscomp_jax.cli.outcome import Result, note
from cluscomp_jax.errors import InputError
from cluscomp_jax.export import FORMATS, export_checkpoint
from cluscomp_jax.io.tokenizer import guess_tokenizer, load_tokenizer, tokenizer_digest
from cluscomp_jax.io.tokenizer.folder import TOKENIZER_JSON
from cluscomp_jax.reporting.tables import format_bytes
from cluscomp_jax.runtime.timing import process_peak_rss_bytes


def run(arguments: ExportArguments) -> Result:
    """Returns what was written."""
    began = time.monotonic()
    shard_gb = arguments.shard_gb
    if shard_gb is not None and not 0 < shard_gb <= 1e6:
        raise InputError(f"--shard-gb {shard_gb}: it must be a number above 0, a million at most")
    if shard_gb is not None and "shard_bytes" not in FORMATS[arguments.format].options:
        raise InputError(f"--shard-gb {shard_gb} has no effect on {arguments.format}; leave it out")
    out = Path(arguments.out)
    files = export_checkpoint(
        open_checkpoint(arguments.model),
        out,
        arguments.format,
        dtype=arguments.dtype,
        code_bits=arguments.code_bits,
        shard_bytes=None if shard_gb is None else max(1, int(shard_gb * 1e9)),
        command=command_line(arguments),
    )
    _note_other_tokenizer(out)
    size = sum(file.stat().st_size for file in files)
    seconds, peak = time.monotonic() - began, process_peak_rss_bytes()
    fields = {
        "out": str(out),
        "format": arguments.format,
        "files": len(files),
        "bytes": size,
        "seconds": seconds,
        "peak_rss_bytes": peak,
    }
    text = f"{out}: {arguments.format}, {len(files)} files, {format_bytes(size)}, {seconds:.1f} s"
    return Result(f"{text}, peak memory {format_bytes(peak)}", fields)


def _note_other_tokenizer(folder: Path) -> None:
    """Notes where transformers' own choice of a class splits texts in another way than tokenizer.json says."""
    if not ((folder / TOKENIZER_JSON).is_file() and (folder / "config.json").is_file()):
        return
    try:
        chosen: Any = guess_tokenizer(folder)
    except InputError as error:
        note(f"AutoTokenizer cannot read the tokenizer of {folder} ({error}); PreTrainedTokenizerFast reads it")
        return
    if tokenizer_digest(chosen) != tokenizer_digest(load_tokenizer(folder)):
        note(
            f"AutoTokenizer takes {type(chosen).__name__} for {folder}, which splits texts in another way than its "
            "tokenizer.json; load the tokenizer by PreTrainedTokenizerFast"
        )
