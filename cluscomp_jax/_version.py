"""The versions that a result depends on."""

from importlib.metadata import version


def versions() -> dict[str, str]:
    """Returns {distribution: version} of this package and of what computes its results."""
    return {name: version(name) for name in ("cluscomp-jax", "jax", "jaxlib", "optax", "numpy")}
