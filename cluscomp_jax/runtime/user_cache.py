"""Where a user's cached files are."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Returns $XDG_CACHE_HOME, or ~/.cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
