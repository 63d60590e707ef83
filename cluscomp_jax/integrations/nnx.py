"""Flax nnx: a clustered nnx module as a module, whose codebooks are Variables that nnx.Optimizer trains.

Knows nnx's graph of a module, not what the module computes.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from cluscomp_jax.core import pytrees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.masters import rounded
from cluscomp_jax.errors import InputError
from cluscomp_jax.tracing.with_codebooks import with_codebooks


class Codebook(nnx.Param):  # type: ignore[misc]
    """A codebook [*stack, n, g], float32 while it trains."""


class Index(nnx.Variable):  # type: ignore[misc]
    """The index of a kernel, which does not train."""


class Replaced(nnx.Variable):  # type: ignore[misc]
    """A Variable of the host whose kernel is elsewhere; its own number means nothing."""


class _Kernel(nnx.Module):  # type: ignore[misc]
    """A CodebookArray as two Variables; one Codebook serves all kernels that share it."""

    def __init__(self, array: CodebookArray, codebook: Codebook):
        self.codebook = codebook
        self.index = Index(jnp.asarray(array.index))
        self.static = (array.matrix_shape, array.axis, array.tied_to, array.host, array.coding)

    def array(self) -> CodebookArray:
        """Returns the CodebookArray, its codebook float32."""
        return CodebookArray(self.codebook[...], self.index[...], *self.static)


class ClusteredModule(nnx.Module):  # type: ignore[misc]
    """An nnx module with CodebookArrays for kernels: `module(*args)` is the host's own forward pass.

    Made by `convert`. What the host's Variables change in a call (statistics, caches, counts of keys) is kept, and
    `eval()` and `train()` reach the host. Methods other than `__call__` are those of `module()`, by `with_codebooks`.
    """

    def __init__(self, module: Any):
        state = nnx.to_flat_state(nnx.state(module))
        arrays = {path: variable[...] for path, variable in state}
        kernels = {path: array for path, array in arrays.items() if isinstance(array, CodebookArray)}
        names = {"/".join(map(str, path)): path for path in kernels}
        self._paths, self._kinds = tuple(kernels), tuple(type(v) for path, v in state if path in kernels)
        codebooks: dict[str, Codebook] = {}
        found = []
        for name, path in names.items():
            owner = pytrees.owner_path(name, kernels[path].tied_to, names)
            if owner not in codebooks:
                codebooks[owner] = Codebook(jnp.asarray(kernels[names[owner]].codebook).astype(jnp.float32))
            found.append(_Kernel(kernels[path], codebooks[owner]))
        self.kernels = nnx.List(found)
        self.host = nnx.clone(module)
        for path in kernels:
            _put(self.host, path, Replaced(jnp.zeros(())))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the host's `__call__` does with these arguments.

        Raises:
          InputError: the call adds Variables to the host, as `sow` does.
        """
        graph, state = nnx.split(self.host)
        before = {path for path, _ in nnx.to_flat_state(state)}

        def call(arrays: dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
            flat = [(path, variable.replace(arrays[path])) for path, variable in nnx.to_flat_state(state)]
            module = nnx.merge(graph, nnx.from_flat_state(flat))
            result = module(*args, **kwargs)
            after = dict(nnx.to_flat_state(nnx.state(module)))
            for path in after.keys() - before:
                raise InputError(
                    f"the call adds {'/'.join(map(str, path))!r} to the module; use module() for such calls"
                )
            return result, {path: after[path][...] for path in before - set(self._paths)}

        arrays = {path: variable[...] for path, variable in nnx.to_flat_state(state)}
        arrays |= {path: kernel.array() for path, kernel in zip(self._paths, self.kernels, strict=True)}
        result, after = with_codebooks(call)(arrays, *args, **kwargs)
        for path, variable in nnx.to_flat_state(nnx.state(self.host)):
            if path in after and not isinstance(variable, nnx.Param):
                _at(self.host, path)[...] = after[path]
        return result

    def module(self) -> Any:
        """Returns the host's module, its kernels CodebookArrays in 16 bit; `save` takes it."""
        module = nnx.clone(self.host)
        for path, kind, kernel in zip(self._paths, self._kinds, self.kernels, strict=True):
            _put(module, path, kind(rounded(kernel.array())))
        return module


def convert(module: Any) -> ClusteredModule:
    """Returns a clustered nnx module as a module that is called, trained and split as any other.

    Its codebooks are `Codebook` Variables, a kind of nnx.Param, in float32: `nnx.Optimizer(model, tx, wrt=Codebook)`
    trains them alone, `wrt=nnx.Param` the host's other parameters too. Its indices are `Index` Variables.

    Args:
      module: an nnx module after `cluster_tree`.

    Raises:
      InputError: no kernel of the module is clustered.
    """
    if not any(isinstance(leaf, CodebookArray) for _, leaf in pytrees.iterate(module)):
        raise InputError("the module holds no CodebookArray; cluster it first: convert(cluster_tree(module, rules))")
    return ClusteredModule(module)


def _at(module: Any, path: tuple[Any, ...]) -> Any:
    """Returns what the module has at a path of its state: attributes, and numbers or keys of what holds them."""
    for name in path:
        module = getattr(module, name) if isinstance(name, str) and hasattr(module, name) else module[name]
    return module


def _put(module: Any, path: tuple[Any, ...], value: Any) -> None:
    """Puts a Variable in the place of that path."""
    parent, name = _at(module, path[:-1]), path[-1]
    if isinstance(name, str) and hasattr(parent, name):
        setattr(parent, name, value)
    else:
        parent[name] = value
