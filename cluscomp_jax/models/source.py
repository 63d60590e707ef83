"""Where parameters come from and go to, one block at a time: two small protocols and their in-memory forms."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

import cluscomp_jax._version as version
from cluscomp_jax.core import trees
from cluscomp_jax.core.caller_mesh import on_one_device
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model, parameter_shapes


@runtime_checkable
class ParamSource(Protocol):
    """Hands out host arrays, block by block. Implementations hold no more than they must between calls."""

    def load_block(self, i: int) -> Params:
        """Returns block i's tree with block-relative paths."""
        ...

    def load_outer(self) -> Params:
        """Returns everything outside the blocks, with full paths."""
        ...

    def fingerprint(self) -> str:
        """Returns a hex digest that changes when the parameters do."""
        ...


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Everything that the bytes of a run's result depend on.

    Attributes:
      parts: {what it is: its digest, or its value where that is short}, for telling what differs.
    """

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The hex digest of all of it."""
        return _digest(dict(self.parts))

    def including(self, **parts: str | None) -> "Fingerprint":
        """Returns the fingerprint of these and more parts; None: there is none of the name."""
        return Fingerprint({**self.parts, **{name: value or "none" for name, value in parts.items()}})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_fingerprint(
    source: ParamSource, config: Mapping[str, Any], model_config: Any, **inputs: str | None
) -> Fingerprint:
    """Returns what the bytes of a run's result depend on.

    Args:
      source: of the parameters.
      config: the run's settings as JSON values.
      model_config: the model's config.
      **inputs: digests of what else is read, by name.
    """
    parts = {
        "settings": _digest(config),
        "model": _digest(repr(model_config)),
        "weights": source.fingerprint(),
        "device": jax.devices()[0].device_kind,
        "number of CPU threads": str(_cpu_threads()),
        **{f"version of {name}": number for name, number in version.versions().items()},
        **{name: "none" if digest is None else digest for name, digest in inputs.items()},
    }
    return Fingerprint(parts)


def _cpu_threads() -> int:
    """Returns in how many parts XLA cuts its work on a CPU, by which sums are rounded; 0 for other devices."""
    if jax.default_backend() != "cpu":
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("NPROC") or usable)


class BlockSink(Protocol):
    """Takes finished blocks, and gives them back to a run that is resumed after them."""

    def store_block(self, i: int, tree: Params) -> None:
        """Keeps block i; `tree` has block-relative paths."""
        ...

    def store_outer(self, tree: Params) -> None:
        """Keeps everything outside the blocks; `tree` has full paths."""
        ...

    def load_block(self, i: int) -> Params:
        """Returns a block that was stored."""
        ...


class DictSource:
    """A ParamSource over a nested dict in the FlaxLlama layout (string or integer layer keys).

    Raises:
      InputError: a parameter of the model is missing, is of another shape, or is one that the model does not have.
    """

    def __init__(self, params: Mapping[Any, Any], model: Model):
        self._params = params
        self._blocks_path = model.blocks_path
        found = len(trees.subtree(params, model.blocks_path))
        if found != model.num_blocks:
            raise InputError(f"{model.blocks_path} holds {found} blocks, the model config says {model.num_blocks}")
        _check_shapes(trees.flatten(params), model)

    def load_block(self, i: int) -> Params:
        """Returns block i's tree with block-relative paths; arrays on several devices come from the host."""
        block: Params = jax.tree.map(on_one_device, trees.subtree(self._params, f"{self._blocks_path}/{i}"))
        return block

    def load_outer(self) -> Params:
        """Returns everything outside the blocks, with full paths; arrays on several devices come from the host."""
        outer: Params = jax.tree.map(on_one_device, trees.without(self._params, self._blocks_path))
        return outer

    def fingerprint(self) -> str:
        """Returns the SHA-256 of every path, shape, dtype and byte."""
        digest = hashlib.sha256()
        for path, leaf in sorted(trees.flatten(self._params).items()):
            # Of a CodebookArray the structure holds shape and axis.
            arrays, structure = jax.tree.flatten(leaf)
            digest.update(f"{path} {structure}".encode())
            for array in map(np.asarray, arrays):
                digest.update(f" {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _check_shapes(flat: Mapping[str, Any], model: Model) -> None:
    expected = parameter_shapes(model)
    for path, shape in expected.items():
        if path not in flat:
            raise InputError(f"the parameters have no {path!r}; the model config asks for it, of shape {shape}")
        if tuple(flat[path].shape) != shape:
            raise InputError(f"{path!r} has shape {tuple(flat[path].shape)}; the model config says {shape}")
    for path in flat:
        if path not in expected:
            raise InputError(f"the model has no parameter {path!r}; take it out, or correct the model config")


class DictSink:
    """A BlockSink that gathers a whole params dict in memory: `.params(model)`."""

    def __init__(self) -> None:
        self._blocks: dict[int, Params] = {}
        self._rest: Params = {}

    def store_block(self, i: int, tree: Params) -> None:
        """Keeps block i."""
        self._blocks[i] = tree

    def store_outer(self, tree: Params) -> None:
        """Keeps everything outside the blocks."""
        self._rest = tree

    def load_block(self, i: int) -> Params:
        """Returns a block that was stored."""
        return self._blocks[i]

    def params(self, model: Model) -> Params:
        """Returns the whole tree of what was stored."""
        flat = trees.flatten(self._rest)
        for i in sorted(self._blocks):
            flat.update(
                {f"{model.blocks_path}/{i}/{path}": leaf for path, leaf in trees.flatten(self._blocks[i]).items()}
            )
        return trees.unflatten(flat)


def as_source(params: "Mapping[Any, Any] | ParamSource", model: Model) -> ParamSource:
    """Returns `params` as a ParamSource: a mapping is wrapped, a source is returned as it is."""
    return DictSource(params, model) if isinstance(params, Mapping) else params


def load_all(source: ParamSource, model: Model) -> Params:
    """Returns the whole params dict of a source; for models that fit in host memory."""
    sink = DictSink()
    sink.store_outer(source.load_outer())
    for i in range(model.num_blocks):
        sink.store_block(i, source.load_block(i))
    return sink.params(model)
