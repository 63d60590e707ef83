"""cluster_tree: any pytree of arrays with its matched leaves clustered, whatever their rank and stacked axes.

`abstract` has the shapes of its result.

Knows no model: activations come in as Hessians, if at all. `compress` and `compress_blocks` collect them themselves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.error_feedback import factor_hessian
from cluscomp_jax.clustering.matrix import cluster_matrix, matrix_key
from cluscomp_jax.clustering.resolve import refuse_growth
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.core import pytrees
from cluscomp_jax.core.caller_mesh import on_one_device, without_mesh
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import stored_bits
from cluscomp_jax.core.host_axes import parse_axes, with_stack
from cluscomp_jax.core.pytrees import shape_struct
from cluscomp_jax.core.stacking import join
from cluscomp_jax.errors import InputError

_SHOWN = 8


def cluster_tree(
    tree: Any,
    rules: Sequence[CompressionRule],
    *,
    hessians: Mapping[str, Any] | None = None,
    settings: ClusterConfig | None = None,
    seed: int = 42,
) -> Any:
    """Returns the tree, its leaves that a rule matches as CodebookArrays in the host's axes; boxes are kept.

    Args:
      tree: any pytree of arrays: nested dicts and lists, registered dataclasses, nnx states and modules, equinox
        modules, linen variables with or without boxes. Other leaves are kept as they are.
      rules: the first rule whose pattern matches the whole path of a leaf decides. Its `axes` say which axes are
        stacked, inputs and outputs; every stacked matrix gets its own codebook.
      hessians: {path: E[x x^T], float [*stack, d_in, d_in]} of the inputs of kernels (`collect_hessians`): their
        codes are chosen by error feedback. None, or no entry for a leaf: k-means of the weights alone.
      settings: how matrices become codebooks; its rules and bits are not read.
      seed: with the same tree and rules it fixes every bit of the result.

    Raises:
      InputError: rules that match nothing, or a matched leaf that cannot be clustered, by its path.
    """
    rules, settings, hessians = checked_rules(rules), settings or ClusterConfig(), hessians or {}
    leaves = pytrees.iterate(tree)
    chosen = {path: rule_of(path, rules) for path, _ in leaves}
    refuse_unused(rules, chosen, leaves)
    if unknown := hessians.keys() - {path for path, rule in chosen.items() if rule is not None}:
        raise InputError(f"hessians: {sorted(unknown)[0]!r} is no leaf that a rule matches")
    for path, leaf in leaves:
        rule = chosen[path]
        if rule is not None:
            check_leaf(path, leaf)
            if hessians.get(path) is not None:
                _check_hessian(path, hessians[path], leaf, rule)
    refuse_growth(_bits_per_weight(leaves, chosen))

    def one(path: str, leaf: Any) -> Any:
        rule = chosen[path]
        return leaf if rule is None else _cluster_leaf(path, leaf, rule, hessians.get(path), settings, seed)

    with without_mesh():
        return pytrees.map_by_path(one, tree)


def abstract(shapes: Any, rules: Sequence[CompressionRule], *, settings: ClusterConfig | None = None) -> Any:
    """Returns the tree that `cluster_tree` gives, with jax.ShapeDtypeStructs for arrays; nothing is computed.

    For plans, shardings and what a checkpoint is restored into. A codebook has the dtype of the settings here;
    `cluster_tree` gives one bfloat16 where float16 does not hold its codes.

    Args:
      shapes: as the tree of `cluster_tree`; ShapeDtypeStructs will do (`jax.eval_shape`).
      rules: as of `cluster_tree`.
      settings: as of `cluster_tree`.

    Raises:
      InputError: rules that match nothing, or a matched leaf that cannot be clustered, by its path.
    """
    rules, settings = checked_rules(rules), settings or ClusterConfig()
    leaves = pytrees.iterate(shapes)
    chosen = {path: rule_of(path, rules) for path, _ in leaves}
    refuse_unused(rules, chosen, leaves)

    def one(path: str, leaf: Any) -> Any:
        rule = chosen[path]
        if rule is not None:
            return _abstract_leaf(path, leaf, rule, settings)
        if isinstance(leaf, CodebookArray) or not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        return shape_struct(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None))

    tree = pytrees.map_by_path(one, shapes)
    refuse_growth(_bits_per_weight(leaves, chosen))
    return tree


def _abstract_leaf(path: str, leaf: Any, rule: CompressionRule, settings: ClusterConfig) -> CodebookArray:
    _check_kind(path, leaf)
    host, stacked = parse_axes(rule.axes, tuple(leaf.shape), leaf.dtype, path)
    if 0 in leaf.shape:
        raise InputError(f"{path}, {tuple(leaf.shape)}, is empty; only weights have codes")
    at, n, g = host.stack_at, rule.num_codes, rule.group_size
    stack, (index_shape, index_dtype) = (
        tuple(leaf.shape[at : at + stacked]),
        rule.coding.index_spec(rule.form(host.matrix_shape)),
    )
    return CodebookArray(
        codebook=shape_struct(with_stack((n, g), stack, at), settings.codebook_dtype),
        index=shape_struct(with_stack(index_shape, stack, at), index_dtype),
        matrix_shape=host.matrix_shape,
        axis=rule.axis,
        host=host,
        coding=rule.coding,
    )


def checked_rules(rules: Any) -> tuple[CompressionRule, ...]:
    """Returns the rules as a tuple. Raises InputError where they are no list of rules, or none."""
    if isinstance(rules, CompressionRule):
        raise InputError("rules is one CompressionRule; give a list of rules, [rule]")
    rules = tuple(rules)
    if not rules or not all(isinstance(rule, CompressionRule) for rule in rules):
        raise InputError(f"rules must be a non-empty list of CompressionRule, not {rules!r:.80}")
    return rules


def rule_of(path: str, rules: Sequence[CompressionRule]) -> CompressionRule | None:
    """Returns the first rule whose pattern matches the whole path."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)


def refuse_unused(
    rules: Sequence[CompressionRule], chosen: Mapping[str, Any], leaves: Sequence[tuple[str, Any]]
) -> None:
    """Raises InputError where a rule decides over no leaf; `chosen` is the rule of each path."""
    unused = [rule.pattern for rule in rules if not any(rule is used for used in chosen.values())]
    if unused:
        kernels = [path for path, leaf in leaves if len(getattr(leaf, "shape", ())) >= 2]
        shown = ", ".join(repr(path) for path in kernels[:_SHOWN]) or "none"
        more = f" and {len(kernels) - _SHOWN} more" if len(kernels) > _SHOWN else ""
        raise InputError(
            f"rule {unused[0]!r} decides over no leaf of the tree; a pattern must match a whole path, and the first "
            f"rule that does decides; paths of arrays of two and more axes: {shown}{more}"
        )


def check_leaf(path: str, leaf: Any) -> None:
    """Raises InputError unless the leaf is an array of finite weights."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise InputError(f"{path} is a ShapeDtypeStruct without numbers; load the parameters first")
    _check_kind(path, leaf)
    if 0 in leaf.shape or not bool(jnp.isfinite(jnp.asarray(leaf)).all()):
        raise InputError(f"{path}, {tuple(leaf.shape)}, is empty or holds NaN or Inf; only finite weights have codes")


def _check_kind(path: str, leaf: Any) -> None:
    """Raises InputError unless the leaf is a floating array, or the shape of one."""
    if isinstance(leaf, CodebookArray):
        raise InputError(f"{path} is clustered already; begin with the original tree")
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise InputError(f"{path} is a {type(leaf).__name__}, no array; let no rule match it")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise InputError(
            f"{path} is {leaf.dtype}; only floating weights can be clustered: multiply quantised ones by their scale "
            "first"
        )


def _bits_per_weight(leaves: Sequence[tuple[str, Any]], chosen: Mapping[str, CompressionRule | None]) -> float:
    bits, weights = 0, 0
    for path, leaf in leaves:
        rule = chosen[path]
        if rule is not None:
            host, _ = parse_axes(rule.axes, tuple(leaf.shape), leaf.dtype, path)
            one = stored_bits(rule.form(host.matrix_shape), rule.coding)
            bits += one * (math.prod(leaf.shape) // math.prod(host.shape))
            weights += math.prod(leaf.shape)
    return bits / weights


def _cluster_leaf(
    path: str, leaf: Any, rule: CompressionRule, hessian: Any, settings: ClusterConfig, seed: int
) -> CodebookArray:
    """Returns the leaf clustered, matrix by matrix, its arrays where the leaf's are."""
    host, stacked = parse_axes(rule.axes, tuple(leaf.shape), leaf.dtype, path)
    on_host = not isinstance(leaf, jax.Array)
    matrices = host.to_stack(np.asarray(on_one_device(leaf)))
    stack, matrix = matrices.shape[:-2], matrices.shape[-2:]
    hessian = None if hessian is None else np.asarray(hessian)
    arrays = []
    for j, one in enumerate(matrices.reshape(-1, *matrix)):
        name = f"{path}[{j}]" if stacked else path
        squares = None if hessian is None else hessian.reshape(-1, *hessian.shape[-2:])[j]
        try:
            arrays.append(jax.device_get(_cluster_one(one, rule, squares, settings, matrix_key(seed, name))))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return join(arrays, host, stack, np if on_host else jnp)


def _cluster_one(
    matrix: np.ndarray, rule: CompressionRule, hessian: Any, settings: ClusterConfig, key: jax.Array
) -> CodebookArray:
    weights = factor = None
    if hessian is not None and settings.weighted:
        weights = np.diagonal(hessian)
    if hessian is not None and settings.error_feedback:
        given = jnp.asarray(hessian, jnp.float32)
        factor = jax.device_get(factor_hessian(given, damping=settings.damping, shrinkage=settings.shrinkage))
    array, _ = cluster_matrix(matrix, rule, settings, key=key, channel_weights=weights, factor=factor)
    return array


def _check_hessian(path: str, hessian: Any, leaf: Any, rule: CompressionRule) -> None:
    """Raises InputError unless it is E[x x^T] of the inputs of the leaf: its shape, floating, finite, squares >= 0."""
    host, stacked = parse_axes(rule.axes, tuple(leaf.shape), leaf.dtype, path)
    d_in = host.matrix_shape[0]
    shape = (*leaf.shape[host.stack_at : host.stack_at + stacked], d_in, d_in)
    found = np.asarray(hessian)
    if found.shape != shape:
        raise InputError(f"hessians: that of {path} has shape {found.shape}; its inputs make {shape}")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise InputError(f"hessians: that of {path} is {found.dtype}; it must be floating")
    if not np.isfinite(found).all():
        raise InputError(f"hessians: that of {path} holds NaN or Inf")
    if (least := np.diagonal(found, axis1=-2, axis2=-1).min()) < 0:
        raise InputError(f"hessians: that of {path} has {least} on its diagonal, which holds means of squares, >= 0")
