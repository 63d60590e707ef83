"""Manifests changed after they were written, with checksums to match: only their contents show it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluscomp_jax.runtime import json_files


def forge(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of a checkpoint and makes its own checksum right again."""
    path = root / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    del fields["sha256"]
    path.write_text(json.dumps({**fields, "sha256": json_files.digest(fields)}))
