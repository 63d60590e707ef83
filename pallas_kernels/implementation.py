"""Which implementation a program uses: its definition in jax.numpy, or GPU kernels where it is compiled for CUDA."""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

Implementation = Literal["definition", "triton", "interpret"]
IMPLEMENTATION: Any = jax.make_user_context(None)  # type: ignore[no-untyped-call]
"""The implementation where a call names none; `with IMPLEMENTATION("definition"):` changes it for the programs traced
inside. None: the GPU kernels where the program is compiled for a CUDA device."""
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


@functools.cache
def cuda_can_be_compiled() -> bool:
    """Returns whether a CUDA backend of JAX is installed; without one no program can be compiled for it."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def only_definition(implementation: Implementation | None) -> bool:
    """Returns whether the definition is all that there is to choose from."""
    return implementation == "definition" or (implementation is None and not cuda_can_be_compiled())


@functools.cache
def no_backend() -> str | None:
    """Returns why this JAX has no backend for the GPU kernels, or None."""
    try:
        importlib.import_module("pallas_kernels.backend")
    except ImportError as error:
        return f"jax {jax.__version__} has no Pallas backend for Triton ({error})"
    return None


@functools.cache
def _log_once(reason: str) -> None:
    _LOG.warning("GPU kernels are not used: %s", reason)


def kernels_or_definition(definition: Callable[..., _T], kernels: Callable[..., _T], *args: Any) -> _T:
    """Returns what `definition(*args)` or `kernels(*args, interpret=)` gives, as `IMPLEMENTATION` says.

    Args:
      definition: traced unless IMPLEMENTATION names the kernels.
      kernels: traced only where a CUDA backend of JAX is installed, or IMPLEMENTATION names them; the same types.
      args: pytrees of arrays.
    """
    implementation = IMPLEMENTATION.value
    if only_definition(implementation):
        return definition(*args)
    if implementation is not None:
        return kernels(*args, interpret=implementation == "interpret")
    reason = no_backend()
    if reason:
        _log_once(reason)
        return definition(*args)
    chosen: _T = jax.lax.platform_dependent(*args, cuda=functools.partial(kernels, interpret=False), default=definition)
    return chosen
