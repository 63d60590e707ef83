"""`cluscomp export`: a compressed folder in a form that other programs load."""

import time
from pathlib import Path

from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.cli.arguments import ExportArguments
from cluscomp_jax.cli.command_line import command_line
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.errors import InputError
from cluscomp_jax.export import FORMATS, export_checkpoint
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
