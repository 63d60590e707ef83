"""The versions that a result depends on."""

import contextlib
from importlib.metadata import PackageNotFoundError, version

_COMPUTING = (
    "cluscomp-jax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "optax", "numpy", "scipy", "ml-dtypes",
    "gguf",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Returns {distribution: version} of this package and of what computes its results, as far as it is installed."""
    found = {}
    for name in _COMPUTING:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
