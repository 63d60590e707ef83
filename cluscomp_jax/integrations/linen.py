"""Flax linen: `apply` of any linen module with clustered variables. Knows no module's internals."""

from collections.abc import Mapping
from typing import Any

from cluscomp_jax.tracing.with_codebooks import with_codebooks


def apply(module: Any, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Returns module.apply(variables, *args, **kwargs), where variables may hold CodebookArrays for arrays.

    Every module is served: `nn.Dense` and its subclasses, `nn.DenseGeneral`, `nn.Einsum`, `nn.scan`, a `dot_general` of
    the user's own. Its products by kernels are computed from codebook and index; see `with_codebooks`.

    Args:
      module: any linen module.
      variables: {"params": tree, …} as `apply` takes them, after `cluster_tree`.
      *args: handed on.
      **kwargs: handed on: `method`, `rngs`, `mutable` and the module's own.
    """
    return with_codebooks(module.apply)(variables, *args, **kwargs)
