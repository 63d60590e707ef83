"""Which layout a tree of parameters has; and, where it has none that is known, what was found instead."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax.core import pytrees, trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layouts.host_tree import HostTree
from cluscomp_jax.models.layouts.layout import Layout, find_roles
from cluscomp_jax.models.layouts.tables import auto
from cluscomp_jax.models.llama import LlamaModel
from cluscomp_jax.models.model import Model
from cluscomp_jax.models.source import ParamSource, as_source

Layouts = Layout | Sequence[Layout]
_OTHERWISE = "cluster the kernels of other trees by compress_blocks or cluster_tree"
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class OpenedTree:
    """Parameters as they were given, ready to be compressed.

    Attributes:
      source: the parameters in our layout.
      model: the decoder that these serve: of the config, and with what the codebase computes otherwise.
      name: of the codebase.
      put_back: gives a result in our layout in the caller's tree.
      stacked: whether the blocks are stacked, so that those of one kernel need equal codes and groups.
    """

    source: ParamSource
    model: Model
    name: str
    put_back: Callable[[Params], Any]
    stacked: bool = False


def open_tree(params: Any, model: Model, layouts: Layouts = auto) -> OpenedTree:
    """Returns the parameters ready to be compressed.

    Args:
      params: a ParamSource, or a tree in our layout or in one of `layouts`.
      model: of the config.
      layouts: one layout, or several, of which the one that names most of the tree is taken.

    Raises:
      InputError: no layout names the tree, or one does and the parameters are not those of the model.
    """
    if isinstance(params, ParamSource):
        return OpenedTree(params, model, "a source", _as_it_is)
    tables = (layouts,) if isinstance(layouts, Layout) else tuple(layouts)
    leaves = _leaves(params)
    counts = [len(find_roles(table, list(leaves))) for table in tables]
    most = max(counts, default=0)
    best = [table for table, count in zip(tables, counts, strict=True) if count == most > 0]
    if _own_blocks(params, model) and (
        not best or (layouts is auto and not any(_renames(table, leaves, model) for table in best))
    ):
        return _own(params, model)
    if not best:
        raise InputError(f"{_found(params, leaves, model)}; known: ours, {', '.join(_names(tables))}; {_OTHERWISE}")
    tree = _first_that_fits(params, best, model)
    return OpenedTree(tree, tree.model, tree.layout.name, tree.put_back, tree.layout.stack_at is not None)


def _as_it_is(result: Params) -> Params:
    return result


def _own(params: Mapping[Any, Any], model: Model) -> OpenedTree:
    source = as_source(params, model)
    for path, leaf in trees.flatten(params).items():
        if not isinstance(leaf, CodebookArray) and not bool(jnp.isfinite(jnp.asarray(leaf)).all()):
            raise InputError(f"{path!r} holds NaN or Inf; only finite weights can be compressed")
    return OpenedTree(source, model, "FlaxLlama", _as_it_is)


def _own_blocks(params: Any, model: Model) -> bool:
    """Returns whether the tree is of nested mappings without boxes and has numbered blocks where the model has them."""
    node = params
    for name in model.blocks_path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            return False
        node = node[name]
    if not isinstance(node, Mapping) or not any(str(key).isdigit() for key in node):
        return False
    try:
        leaves = list(trees.flatten(params).values())
    except InputError:
        return False
    return {id(leaf) for leaf in leaves} == {id(leaf) for _, leaf in pytrees.iterate(params)}


def _renames(layout: Layout, leaves: Mapping[str, Any], model: Model) -> bool:
    """Returns whether the layout finds parameters under names that are not ours."""
    return any(
        host != (role.path if role.in_block is None else f"{model.blocks_path}/{role.block}/{role.path}")
        for host, role in find_roles(layout, list(leaves)).items()
    )


def _first_that_fits(params: Any, tables: Sequence[Layout], model: Model) -> HostTree:
    first: InputError | None = None
    for table in tables:
        if table.families and model.config.model_type not in table.families:
            first = first or InputError(
                f"parameters of {table.name} are read for {', '.join(table.families)}, not for "
                f"{model.config.model_type}, which may compute otherwise there; {_OTHERWISE}"
            )
            continue
        try:
            return HostTree(params, table, _host_model(model, table))
        except InputError as error:
            first = first or error
    assert first is not None
    raise first


def _host_model(model: Model, layout: Layout) -> Model:
    """Returns the model with what the codebase computes otherwise."""
    if not isinstance(model, LlamaModel):
        return model
    return dataclasses.replace(
        model,
        scaled_queries=model.scaled_queries or model.config.model_type in layout.scaled_queries,
        neighbours=model.neighbours or model.config.rope.rope_type in layout.neighbours,
    )


def _names(tables: Sequence[Layout]) -> list[str]:
    return [table.name for table in tables]


def _leaves(params: Any) -> dict[str, Any]:
    """Returns {path: leaf} of a tree that has paths.

    Raises:
      InputError: what has none, named by what it is.
    """
    name = f"{type(params).__module__}.{type(params).__qualname__}"
    leaves = dict(pytrees.iterate(params))
    if isinstance(params, list | tuple):
        raise InputError(
            f"params is a {type(params).__name__} of {len(params)}; give a tree with names, for keras "
            "{v.path: v.value for v in model.weights}"
        )
    if "" not in leaves or len(leaves) > 1:
        return leaves
    if callable(getattr(params, "init", None)) and callable(getattr(params, "apply", None)):
        raise InputError(f'params is a module, {name}; give its parameters, module.init(...)["params"]')
    if dataclasses.is_dataclass(params):
        raise InputError(
            f"params is a {name}, a dataclass that JAX does not know as a tree; give a dict, "
            "dataclasses.asdict(params), or register it by jax.tree_util.register_dataclass"
        )
    if isinstance(params, str):
        raise InputError(f"params is the text {params!r:.60}; cluscomp_jax.open_model(path).source reads a folder")
    raise InputError(f"params is a {name}; give a tree of arrays, for a module its parameters, or a ParamSource")


def _found(params: Any, leaves: Mapping[str, Any], model: Model) -> str:
    if not leaves:
        return f"params, a {type(params).__name__}, holds no arrays"
    if abstract := [path for path, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise InputError(f"{abstract[0]!r} is a ShapeDtypeStruct without numbers; load the parameters first")
    arrays = [f"{path} {list(leaf.shape)}" for path, leaf in leaves.items() if hasattr(leaf, "shape")]
    more = f" and {len(arrays) - _SHOWN} more" if len(arrays) > _SHOWN else ""
    shown = ", ".join(arrays[:_SHOWN])
    return f"no layout has the names of params, a {type(params).__name__} with no {model.blocks_path!r}: {shown}{more}"
