"""Flax nnx: a clustered nnx module as a module, whose codebooks are Variables that nnx.Optimizer trains.

Knows nnx's graph of a module, not what the module computes.
"""

from typing import Any

import jax
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


class _Kernel(nnx.Module):  # type: ignore[misc]
    """A CodebookArray as two Variables."""

    def __init__(self, array: CodebookArray):
        self.codebook = Codebook(jnp.asarray(array.codebook).astype(jnp.float32))
        self.index = Index(jnp.asarray(array.index))
        self.static = (array.matrix_shape, array.axis, array.tied_to, array.host)

    def array(self) -> CodebookArray:
        """Returns the CodebookArray, its codebook float32."""
        return CodebookArray(self.codebook[...], self.index[...], *self.static)


class ClusteredModule(nnx.Module):  # type: ignore[misc]
    """An nnx module with CodebookArrays for kernels: `module(*args)` is the host's own forward pass.

    Made by `convert`. What the host's Variables change in a call (statistics, caches, counts of keys) is kept.
    """

    def __init__(self, module: Any):
        graph, state = nnx.split(module)
        leaves, structure = jax.tree.flatten(state, is_leaf=pytrees.is_codebook_array)
        self._graph, self._structure = graph, structure
        self.kernels = nnx.List([_Kernel(leaf) for leaf in leaves if isinstance(leaf, CodebookArray)])
        self.host = nnx.List(_variables(state, leaves))
        self._is_kernel = tuple(isinstance(leaf, CodebookArray) for leaf in leaves)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the host's `__call__` does with these arguments."""

        def call(leaves: list[Any], *args: Any, **kwargs: Any) -> Any:
            module = nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
            result = module(*args, **kwargs)
            after = jax.tree.leaves(nnx.state(module))
            return result, [leaf for leaf, kernel in zip(after, self._is_kernel, strict=True) if not kernel]

        result, after = with_codebooks(call)(self._leaves(), *args, **kwargs)
        for variable, value in zip(self.host, after, strict=True):
            if not isinstance(variable, nnx.Param):
                variable[...] = value
        return result

    def module(self) -> Any:
        """Returns the host's module, its kernels CodebookArrays in 16 bit; `save` takes it."""
        state = jax.tree.unflatten(self._structure, self._leaves())
        return nnx.merge(self._graph, rounded(state))

    def _leaves(self) -> list[Any]:
        kernels, host = iter(self.kernels), iter(self.host)
        return [next(kernels).array() if kernel else next(host)[...] for kernel in self._is_kernel]


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


def _variables(state: Any, leaves: list[Any]) -> list[Any]:
    """Returns a Variable of the host's own type for each leaf that is no CodebookArray."""
    boxes = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [type(box)(leaf) for box, leaf in zip(boxes, leaves, strict=True) if not isinstance(leaf, CodebookArray)]
