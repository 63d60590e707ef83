"""Cards that need not be there: their descriptions, and where XLA is to place arrays to compile for one.

Knows no model and no program.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime.extras import install_command
from cluscomp_jax.runtime.suppress_output import silenced
from pallas_kernels import _compat

_MAX_BYTES = 1_000_000
_NUMBER = r"[:=]\s*([0-9.eE+]+)"


@dataclasses.dataclass(frozen=True)
class Target:
    """A described card.

    Attributes:
      name: what it is called in reports.
      text: the description, a stream_executor.GpuTargetConfigProto in text form.
      capability: compute capability, (major, minor).
      memory_bytes: of the device.
      bandwidth: bytes per second of device memory, as published.
      vector_lr_scale: float32 operations per second outside matrix units, as published.
      matrix_rate: operations per second of dense 16-bit matrix products; `vector_lr_scale` where the description has no
        comment "matrix_rate = …".
    """

    name: str
    text: str
    capability: tuple[int, int]
    memory_bytes: int
    bandwidth: float
    vector_lr_scale: float
    matrix_rate: float


def shipped_targets() -> list[str]:
    """Returns the names of the cards whose descriptions ship with the package."""
    return sorted(file.name.removesuffix(".txtpb") for file in _folder().iterdir() if file.name.endswith(".txtpb"))


def find_target(spec: str | Path) -> Target:
    """Returns the card that `spec` names: a shipped one ("a6000"), or a .txtpb file of the caller's.

    Raises:
      InputError: nothing of that name, or a description without sizes and rates.
    """
    name = str(spec)
    if name in shipped_targets():
        return _parsed(name, _folder().joinpath(f"{name}.txtpb").read_text(encoding="utf-8"))
    path = Path(spec)
    if path.suffix != ".txtpb" or not path.is_file():
        raise InputError(
            f"target {name!r} is neither one of {', '.join(shipped_targets())} nor a .txtpb file; "
            "copy one of cluscomp_jax/plan/targets/ to describe another card"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"target {path}: {path.stat().st_size} bytes; a description has fewer than {_MAX_BYTES}")
    try:
        return _parsed(path.stem, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"target {path}: not UTF-8 text; it must be a GpuTargetConfigProto in text form") from error


def _folder() -> Any:
    return resources.files("cluscomp_jax.plan").joinpath("targets")


def _parsed(name: str, text: str) -> Target:
    def number(key: str) -> float | None:
        found = re.search(rf"\b{key}\s*{_NUMBER}", text)
        try:
            value = float(found[1]) if found else 0.0
        except ValueError:
            value = 0.0
        return value if value > 0 else None

    def needed(key: str) -> float:
        value = number(key)
        if value is None:
            raise InputError(
                f"target {name}: has no positive {key}; compare it with those in cluscomp_jax/plan/targets/"
            )
        return value

    vector = 2 * needed("core_count") * needed("fpus_per_core") * needed("clock_rate_ghz") * 1e9
    return Target(
        name=name,
        text=text,
        capability=_capability(name, text),
        memory_bytes=int(needed("device_memory_size")),
        bandwidth=needed("memory_bandwidth"),
        vector_lr_scale=vector,
        matrix_rate=number("matrix_rate") or vector,
    )


def _capability(name: str, text: str) -> tuple[int, int]:
    fields = re.search(r"\bcuda_compute_capability\s*:?\s*\{([^}]*)\}", text)
    major, minor = (re.search(rf"\b{part}\s*:\s*(\d+)", fields[1] if fields else "") for part in ("major", "minor"))
    found = (int(major[1]) if major else 0, int(minor[1]) if minor else 0)
    if found not in _compat.DEVICE_KINDS:
        known = ", ".join(f"{a}.{b}" for a, b in _compat.DEVICE_KINDS)
        raise InputError(
            f"target {name}: its cuda_compute_capability is {found[0]}.{found[1]}; "
            f"Pallas' GPU kernels compile for {known}"
        )
    return found


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Programs traced and lowered inside hold GPU kernels for the card, which need not be here."""
    with _compat.lowering_for(target.capability):
        yield


def placement(target: Target) -> jax.sharding.Sharding:
    """Returns the sharding of arrays on the described card; programs traced with it, inside `compiling_for`, compile
    for that card.

    Raises:
      InputError: JAX's CUDA compiler is not installed, or it cannot read the description.
    """
    everywhere: Any = jax.sharding.PartitionSpec
    return jax.sharding.NamedSharding(card_mesh(target, (1,), ("card",)), everywhere())


def card_mesh(target: Target, sizes: tuple[int, ...], axes: tuple[str, ...]) -> jax.sharding.Mesh:
    """Returns a mesh of this many of the described card, all in one machine.

    Raises:
      InputError: as `placement`.
    """
    shape = f"1x1x{math.prod(sizes)}"
    try:
        with silenced(2):
            topology = topologies.get_topology_desc(platform="cuda", target_config=target.text, topology=shape)
    except NotImplementedError as error:
        raise InputError(
            "compiling for a card takes JAX's CUDA compiler, which is not installed here (no GPU is needed); "
            f"run {install_command('aot')}, and leave JAX_PLATFORMS unset or set it to cpu"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"target {target.name}: XLA cannot read the description: {reason}") from error
    return topologies.make_mesh(topology, sizes, axes)
