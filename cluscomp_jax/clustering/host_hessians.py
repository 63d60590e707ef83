"""collect_hessians: what the kernels of any model read, as Hessians for `cluster_tree`.

By tracing: the model is a function of parameters and a batch, of whatever framework.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.tree import check_leaf, checked_rules, refuse_unused, rule_of
from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core import pytrees
from cluscomp_jax.core.caller_mesh import partitioned
from cluscomp_jax.core.host_axes import HostAxes, parse_axes
from cluscomp_jax.core.second_moments import second_moment, symmetric
from cluscomp_jax.errors import InputError
from cluscomp_jax.tracing.evaluate import Record, evaluate
from cluscomp_jax.tracing.kernel import TracedKernel


def collect_hessians(
    apply: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], rules: Sequence[CompressionRule]
) -> dict[str, np.ndarray]:
    """Returns {path: E[x x^T], float32 [*stack, d_in, d_in]}, means over all rows x that the kernels multiply.

    A kernel that `lax.scan` takes from a stack has a Hessian for each of its matrices. Every batch shape compiles anew.

    Args:
      apply: (params, batch) -> anything; pure. It is traced, and its products x @ W by matched kernels are observed.
      params: any pytree, as `cluster_tree` takes it.
      batches: pytrees of arrays, at least one.
      rules: those that `cluster_tree` is to use.

    Raises:
      InputError: a kernel that no product reads as x @ W, or no batch.
    """
    rules = checked_rules(rules)
    if hasattr(batches, "shape"):
        raise InputError("batches is one array; give a list of batches, [batch]")
    leaves = pytrees.iterate(params)
    chosen = {path: rule_of(path, rules) for path, _ in leaves}
    kernels: dict[str, HostAxes] = {}
    stacked: dict[str, int] = {}
    for path, leaf in leaves:
        rule = chosen[path]
        if rule is not None:
            check_leaf(path, leaf)
            kernels[path], stacked[path] = parse_axes(rule.axes, tuple(leaf.shape), leaf.dtype, path)
    refuse_unused(rules, chosen, leaves)
    filled, arrays = pytrees.by_arrays(lambda params: params, (params,), _is_array)
    paths = [path for path, leaf in leaves if _is_array(leaf)]

    def whole(arrays: Sequence[Any], batch: Any) -> Any:
        return jax.tree.leaves(apply(filled(*arrays), batch))

    @jax.jit
    def sums(arrays: Sequence[Any], batch: Any) -> dict[str, Record]:
        closed = jax.make_jaxpr(whole)(arrays, batch)
        values = [
            TracedKernel.of_matrix(array, kernels[path], path) if path in kernels else array
            for path, array in zip(paths, arrays, strict=True)
        ]
        _, records = evaluate(closed.jaxpr, closed.consts, [*values, *jax.tree.leaves(batch)], _products_of)
        return records

    total: dict[str, Record] | None = None
    for batch in batches:
        found = sums(arrays, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise InputError("batches is empty; at least one is needed")
    for path in kernels:
        if path not in total:
            raise InputError(
                f"{path}: no product x @ W of the model reads it with these axes; let no rule match it, or correct "
                "the rule's axes"
            )
    return {path: _mean(path, total[path], stacked[path]) for path in kernels}


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _products_of(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (the sum of x x^T over all rows, their number)."""

    def product(x: jax.Array) -> jax.Array:
        return symmetric(second_moment(x.reshape(-1, x.shape[-1])))

    return partitioned(product, (x,), (None, None)), jnp.float32(x.size // x.shape[-1])


def _mean(path: str, record: Record, stacked: int) -> np.ndarray:
    """Returns the mean, its stacked axes in the order of the kernel's."""
    if len(record.places) != stacked:
        raise InputError(
            f"{path}: the model takes single matrices out of the stack; it must run them in a scan or all together"
        )
    order = sorted(range(stacked), key=record.places.__getitem__)
    total, count = (np.asarray(part) for part in record.value)
    number = count.transpose(order)
    return total.transpose((*order, stacked, stacked + 1)) / number.reshape((*number.shape, 1, 1))
