"""HostTree: the parameters of a host as a ParamSource in our layout, and results back in the host's own tree."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import pytrees, trees
from cluscomp_jax.core.caller_mesh import on_one_device
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import with_stack
from cluscomp_jax.core.stacking import join
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layouts.layout import Layout, Role, find_roles, host_axes, host_shape, is_kernel
from cluscomp_jax.models.model import Model, parameter_shapes
from cluscomp_jax.models.source import DictSource, load_all


class HostTree:
    """A ParamSource over any pytree whose paths a layout names; it converts one block at a time.

    Attributes:
      layout: of the tree.
      model: the decoder that the tree's arrays serve.
      roles: {host path: role} of what the layout names.

    Raises:
      InputError: a parameter of the model is missing, is of another shape, or is one that the model does not have.
    """

    def __init__(self, params: Any, layout: Layout, model: Model):
        self.layout, self.model = layout, model
        self._params, self._leaves = params, dict(pytrees.iterate(params))
        self.roles = find_roles(layout, list(self._leaves))
        self._paths = self._ours()
        self._check()

    def load_block(self, i: int) -> Params:
        """Returns block i's tree with block-relative paths; arrays on several devices come from the host."""
        prefix = f"{self.model.blocks_path}/{i}/"
        shapes = self.model.block_shapes(i)
        return trees.unflatten({path: self._taken(self._paths[prefix + path], i, shapes[path]) for path in shapes})

    def load_outer(self) -> Params:
        """Returns everything outside the blocks, with full paths; arrays on several devices come from the host."""
        shapes = self.model.outer_shapes()
        return trees.unflatten({path: self._taken(self._paths[path], None, shapes[path]) for path in shapes})

    def fingerprint(self) -> str:
        """Returns what `DictSource` returns for the same parameters in our layout."""
        return DictSource(load_all(self, self.model), self.model).fingerprint()

    def put_back(self, result: Params) -> Any:
        """Returns the host's tree with the CodebookArrays of `result`, and what else of its blocks has changed.

        Args:
          result: in our layout, of every block.
        """
        flat = trees.flatten(result)
        return pytrees.map_by_path(lambda path, leaf: self._back(path, leaf, flat), self._params)

    def _ours(self) -> dict[str, str]:
        """Returns {our path: host path}, of stacked arrays under the path of every block."""
        found: dict[str, str] = {}
        for host, role in self.roles.items():
            blocks: Sequence[int | None] = (role.block,)
            if self.layout.stack_at is not None and role.in_block is not None:
                blocks = range(self.model.num_blocks)
            for block in blocks:
                path = role.path if block is None else f"{self.model.blocks_path}/{block}/{role.path}"
                if path in found:
                    raise InputError(f"{self._where()}: {found[path]!r} and {host!r} are both {path!r}; take one out")
                found[path] = host
        return found

    def _where(self) -> str:
        return f"parameters of {self.layout.name}"

    def _stack_at(self, role: Role) -> int | None:
        return None if role.in_block is None else self.layout.stack_at

    def _check(self) -> None:
        """Raises InputError unless the host's arrays are those of the model."""
        self._check_blocks()
        expected = parameter_shapes(self.model)
        for path, shape in expected.items():
            if path not in self._paths:
                raise InputError(f"{self._where()}: none is {path!r}; the model config asks for it, of shape {shape}")
        spare = {"lm_head/kernel"} - expected.keys()  # stored in vain where embeddings are tied
        for path, host in self._paths.items():
            if path in expected:
                self._check_leaf(host, expected[path])
            elif path not in spare:
                raise InputError(f"{self._where()}: the model has no {host!r}; take it out, or correct the config")
        unused = re.compile(self.layout.unused)
        for host, leaf in self._leaves.items():
            if host not in self.roles and is_floating(leaf) and not unused.fullmatch(host):
                raise InputError(
                    f"{self._where()}: {host!r} is no parameter of a {self.model.config.model_type}; take it out, "
                    "or cluster its tree by compress_blocks or cluster_tree"
                )

    def _check_blocks(self) -> None:
        found, wanted = {role.block for role in self.roles.values()} - {None}, self.model.num_blocks
        if self.layout.stack_at is None and found != set(range(wanted)):
            raise InputError(f"{self._where()}: {len(found)} blocks, the model config says {wanted}")

    def _check_leaf(self, host: str, ours: tuple[int, ...]) -> None:
        leaf, role = self._leaves[host], self.roles[host]
        if isinstance(leaf, CodebookArray):
            raise InputError(f"{host} is compressed already; begin with the original parameters")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InputError(f"{host!r} is a ShapeDtypeStruct without numbers; load the parameters first")
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise InputError(f"{host!r} is a {type(leaf).__name__}; give arrays of JAX or NumPy")
        if not is_floating(leaf):
            raise InputError(f"{host!r} is {leaf.dtype}; multiply quantised weights by their scale first")
        wanted, at = host_shape(role.axes, ours, self.model), self._stack_at(role)
        found = tuple(leaf.shape)
        if at is not None:
            if len(found) == len(wanted) + 1 and found[at] != self.model.num_blocks:
                raise InputError(
                    f"{self._where()}: {host!r} has {found[at]} blocks along axis {at}, the model config says "
                    f"{self.model.num_blocks}"
                )
            wanted = with_stack(wanted, (self.model.num_blocks,), at)
        if found != wanted:
            turned = "; is it [out, in]?" if is_kernel(role.axes) and found == wanted[::-1] else ""
            raise InputError(f"{self._where()}: {host!r} has shape {found}; the model config says {wanted}{turned}")
        if not bool(jnp.isfinite(jnp.asarray(leaf)).all()):
            raise InputError(f"{host!r} holds NaN or Inf; only finite weights can be compressed")

    def _taken(self, host: str, block: int | None, shape: tuple[int, ...]) -> Any:
        """Returns our array of a host's, of one block where it stacks them."""
        role = self.roles[host]
        return self._ours_of(role, self._one(on_one_device(self._leaves[host]), role, block), shape)

    def _one(self, array: Any, role: Role, block: int | None) -> Any:
        at = self._stack_at(role)
        return array if at is None else array[(slice(None),) * at + (block,)]

    def _ours_of(self, role: Role, array: Any, shape: tuple[int, ...]) -> Any:
        if not is_kernel(role.axes):
            return array.reshape(shape)
        return host_axes(role.axes, array.shape, array.dtype, self.layout).to_matrix(array)

    def _back(self, host: str, leaf: Any, flat: Mapping[str, Any]) -> Any:
        role = self.roles.get(host)
        if role is None or role.in_block is None:
            return leaf
        at = self._stack_at(role)
        blocks = (role.block,) if at is None else range(self.model.num_blocks)
        parts = [flat[f"{self.model.blocks_path}/{i}/{role.path}"] for i in blocks]
        if isinstance(parts[0], CodebookArray):
            shape = leaf.shape if at is None else (*leaf.shape[:at], *leaf.shape[at + 1 :])
            axes = host_axes(role.axes, shape, leaf.dtype, self.layout)
            joined = join(parts, axes, () if at is None else (len(parts),), jnp if isinstance(leaf, jax.Array) else np)
            return dataclasses.replace(joined, tied_to=self._owner(parts[0], role))
        if is_kernel(role.axes):
            return leaf
        return self._changed(leaf, role, parts, list(blocks))

    def _owner(self, array: CodebookArray, role: Role) -> str | None:
        """Returns the path, relative to the host's block, of the kernel whose codebook the array has."""
        if array.tied_to is None:
            return None
        owner = next(p for p in self.roles.values() if p.path == array.tied_to and p.block == role.block)
        return owner.in_block

    def _changed(self, leaf: Any, role: Role, parts: list[Any], blocks: list[Any]) -> Any:
        """Returns the host's array of norms or biases; the leaf itself where training has changed none."""
        before = np.asarray(on_one_device(leaf))
        after = before.copy()
        for i, part in zip(blocks, parts, strict=True):
            view = self._one(after, role, i)
            if not np.array_equal(self._ours_of(role, view, part.shape), np.asarray(part)):
                view[...] = np.asarray(part).astype(before.dtype).reshape(view.shape)
        if np.array_equal(before, after):
            return leaf
        return jnp.asarray(after) if isinstance(leaf, jax.Array) else after


def is_floating(leaf: Any) -> bool:
    """Returns whether a leaf has floating numbers, or will have."""
    if isinstance(leaf, CodebookArray):
        return True
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
