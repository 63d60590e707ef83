"""What depends on the release of JAX, in one place. Knows no model, and a GPU kernel only by its name.

A release that is not in `TRIED` was released after this file: what needs a switch inside JAX is then left out, with a
line in the log, and tests/test_compat.py fails, so that somebody tries it and adds it here.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Iterator
from typing import Any

_LOG = logging.getLogger(__name__)

TRIED = ("0.10.2", "0.11.2", "0.12.0.1")
"""Releases of jax, and of the jaxlib of the same number, under which everything in this file was tried."""

DEVICE_KINDS = {
    (8, 0): "NVIDIA A100",
    (8, 6): "NVIDIA A10",
    (8, 9): "NVIDIA L40",
    (9, 0): "NVIDIA H100",
    (10, 0): "NVIDIA B200",
    (12, 0): "NVIDIA RTX PRO 6000",
}
"""{compute capability: the name of a card that has it}. Pallas identifies cards by name, and lacks some: the A6000."""

CPU_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"
"""The flag of XLA that orders programs for the CPU by what could run side by side. A jaxlib that does not know a flag
ends the process; those of `TRIED` know it."""


def tried(package: str = "jax", *, patches: bool = False) -> bool:
    """Returns whether the installed release of `package`, "jax" or "jaxlib", is one of `TRIED`; logs once if it is not.

    Reads the package's metadata and imports nothing, so that settings of XLA can be decided before JAX starts.

    Args:
      package: which.
      patches: other releases of the same first two numbers count as tried.
    """
    version = importlib.metadata.version(package)
    known = _minor(version) in map(_minor, TRIED) if patches else version in TRIED
    if not known:
        _log_once(package, version)
    return known


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


@functools.cache
def _log_once(package: str, version: str) -> None:
    _LOG.warning("%s %s was not tried with this package; tried: %s", package, version, ", ".join(TRIED))


@contextlib.contextmanager
def lowering_for(capability: tuple[int, int]) -> Iterator[None]:
    """Programs traced and lowered inside hold GPU kernels for a card of this compute capability, present or not.

    From 0.11.0 on Pallas asks which card it lowers for. `capability` is (major, minor), (8, 6) say.

    Raises:
      ValueError: no card of this capability is listed.
    """
    import jax

    if capability not in DEVICE_KINDS:
        known = ", ".join(f"{major}.{minor}" for major, minor in DEVICE_KINDS)
        raise ValueError(f"compute capability {capability[0]}.{capability[1]} is not one of {known}")
    device: Any = jax.sharding.AbstractDevice(DEVICE_KINDS[capability], num_cores=None, platform="gpu")
    mesh: Any = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def triton_context() -> Any:
    """Returns a context of MLIR that can read the Triton module of a Pallas kernel."""
    lowering: Any = importlib.import_module("jax._src.pallas.triton.lowering")
    return lowering._new_ir_context()


@functools.cache
def relax_atomics(kernel: str) -> bool:
    """Makes the additions of one GPU kernel compile to plain reductions; returns whether they will.

    Pallas orders every atomic against all other memory traffic, a fence for every addition, and has no public switch.
    Where the order between the additions of one launch means nothing, the fences are left out. No other kernel is
    touched. Under a release that was not tried they stay.

    Args:
      kernel: the `name` of the pallas_call.
    """
    if not tried():
        _LOG.warning("%s keeps a fence for each of its atomic additions", kernel)
        return False
    import jax

    lowering: Any = importlib.import_module("jax._src.pallas.triton.lowering")
    addupdate = importlib.import_module("jax._src.state.primitives").addupdate_p
    fenced = lowering.triton_lowering_rules[addupdate]

    def rule(context: Any, ref: Any, value: Any, *index: Any, tree: Any) -> Any:
        if context.context.name != kernel:
            return fenced(context, ref, value, *index, tree=tree)
        (indexer,) = jax.tree.unflatten(tree, index)
        found = lowering._compute_pointers_from_indices(ref, context.block_infos[0], indexer)
        pointers, mask = found if isinstance(found, tuple) else (found, None)  # 0.12 gives a mask too
        relaxed = lowering.tt_dialect.MemSemantic.RELAXED
        lowering._atomic_rmw(lowering.tt_dialect.RMWOp.FADD, pointers, value, mask=mask, semantic=relaxed)
        return []

    lowering.triton_lowering_rules[addupdate] = rule
    return True


def scan_inputs(params: Any, values: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the (constants, carry, scanned arrays) of an equation of `lax.scan`.

    Args:
      params: of the equation.
      values: what it is given, one value for each of its variables.
    """
    if "ft_in" in params:  # since 0.12
        consts, carry, xs = params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    values = list(values)
    return values[:first], values[first:second], values[second:]
