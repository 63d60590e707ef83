"""--mesh: from "data=2,fsdp=4" to MeshConfig. Knows no command."""

from cluscomp_jax.config.settings import MeshConfig
from cluscomp_jax.config.toml import overlay
from cluscomp_jax.errors import InputError


def parse_mesh(text: str) -> MeshConfig:
    """Returns the mesh of AXIS=SIZE pairs, separated by commas; axes that are not named have size 1.

    Raises:
      InputError: an axis that is not known or named twice, or a size that is no number from 1.
    """
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        axis, _, size = (part.strip() for part in pair.partition("="))
        if not size.isdecimal() or axis in sizes:
            raise InputError(f"--mesh {text!r}: {pair!r} must be AXIS=SIZE, every axis once: data=2,fsdp=2,tensor=2")
        sizes[axis] = int(size)
    try:
        return overlay(MeshConfig(), sizes)
    except InputError as error:
        raise InputError(f"--mesh {text!r}: {error}") from error
