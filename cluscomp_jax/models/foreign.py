"""ForeignModel: a stack of blocks of another codebase as a Model, by the program of one block.

The block's kernels are found in the program: which products read them, which of them read one array (an input group),
and what their results are added to. Knows no framework; embedding and head are the host's own.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import pytrees, trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import HostAxes
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Observer
from cluscomp_jax.tracing.evaluate import dense, evaluate
from cluscomp_jax.tracing.kernel import TracedKernel
from cluscomp_jax.tracing.products import ProductTrace, TracedProduct

Apply = Callable[[Any, jax.Array], jax.Array]
"""A block of the host: (its parameters, x [b, ..., d]) -> y of the shape of x."""
_TRACED_SAMPLES = 11


@dataclasses.dataclass(frozen=True, eq=False)
class BlockForm:
    """How the host has the parameters of a block; equal forms share compiled programs.

    Attributes:
      structure: of the tree, CodebookArrays being leaves.
      leaves: {path: shape and dtype of an array, or a leaf that is none}, in the tree's order.
      kernels: {path: axes} of those that are compressed.
    """

    structure: Any
    leaves: Mapping[str, Any]
    kernels: Mapping[str, HostAxes]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockForm) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        leaves = (leaf if is_parameter(leaf) else id(leaf) for leaf in self.leaves.values())
        return self.structure, tuple(self.leaves), tuple(leaves), tuple(self.kernels.items())

    def to_params(self, block: Any) -> Params:
        """Returns the arrays of a block by path, its kernels as matrices [d_in, d_out]."""
        flat = {path: leaf for path, leaf in pytrees.iterate(block) if is_parameter(leaf)}
        return trees.unflatten({p: self.kernels[p].to_matrix(a) if p in self.kernels else a for p, a in flat.items()})

    def to_host(self, params: Params) -> Any:
        """Returns the host's tree of `params`, its arrays in the host's shapes and dtypes."""
        flat = trees.flatten(params)
        return jax.tree.unflatten(self.structure, [self.leaf(path, flat.get(path)) for path in self.leaves])

    def leaf(self, path: str, value: Any) -> Any:
        """Returns the host's leaf at `path`, of the array that `to_params` gives for it."""
        wanted = self.leaves[path]
        if not is_parameter(wanted):
            return wanted
        if isinstance(value, CodebookArray):
            return dataclasses.replace(value, host=self.kernels[path])
        if path in self.kernels:
            return self.kernels[path].from_matrix(value)
        return value.astype(wanted.dtype)


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """Blocks x -> y of another codebase, all of one form, as a Model; `embed` gives zeros, and there is no head.

    Attributes:
      apply: the host's block.
      form: of its parameters.
      item_shape: of x less the samples; the Model's x is [b, t, d] with t all axes between.
      dtype: of x where the program is traced.
      depth: the number of blocks.
    """

    apply: Apply
    form: BlockForm
    item_shape: tuple[int, ...]
    dtype: str
    depth: int

    blocks_path = "blocks"
    row_parallel: frozenset[str] = frozenset()

    @property
    def config(self) -> Any:
        """Names no family, and has no vocabulary."""
        return SimpleNamespace(model_type="foreign", vocab_size=0)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.depth

    @cached_property
    def input_groups(self) -> Mapping[str, tuple[str, ...]]:
        """{input group, named by its first kernel: kernels that read one array}, in the order of their products."""
        groups: dict[Hashable, list[str]] = {}
        for product in _first_of_each(self.traced_products()):
            groups.setdefault(product.source, []).append(product.name)
        return {paths[0]: tuple(paths) for paths in groups.values()}

    @property
    def independent_groups(self) -> Sequence[tuple[str, ...]]:
        """The input groups one by one."""
        return [(group,) for group in self.input_groups]

    def layer_type(self, i: int) -> Hashable:
        """All blocks are of one type."""
        return None

    def block_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """{path: shape} of a block's parameters, its kernels as matrices."""
        arrays = {path: leaf for path, leaf in self.form.leaves.items() if is_parameter(leaf)}
        kernels = self.form.kernels
        return {path: kernels[path].matrix_shape if path in kernels else leaf.shape for path, leaf in arrays.items()}

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Nothing is outside the blocks."""
        return {}

    def embed(self, outer: Params, tokens: jax.Array, *, dtype: Any, position: Any = None) -> jax.Array:
        """Returns zeros [b, t, d]: the blocks' inputs are given as activations, and only their shape is asked for."""
        return jnp.zeros((*tokens.shape, self.item_shape[-1]), dtype)

    def block(self, params: Params, x: jax.Array, *, layer_type: Hashable, observer: Observer | None = None) -> Any:
        """x [b, t, d] -> y [b, t, d]; with an observer, (y, {group: what the observer returns})."""
        shape, x = x.shape, x.reshape(x.shape[0], *self._positions(x), self.item_shape[-1])
        if observer is not None:
            y, products = self._trace(params, x)
            found = {product.name: product for product in _first_of_each(products)}
            seen = {group: self._observed(observer, found, group) for group in self.input_groups}
            return y.reshape(shape), seen
        if not any(isinstance(leaf, CodebookArray) for leaf in trees.flatten(params).values()):
            return self.apply(self.form.to_host(params), x).reshape(shape)
        return self._run(params, x, None).reshape(shape)

    def arranged(self, params: Params) -> Params:
        """Returns the parameters unchanged."""
        return params

    def head(self, outer: Params, x: jax.Array) -> NoReturn:
        """There is none."""
        raise NotImplementedError("the head of a foreign model is the host's")

    def init_cache(self, i: int, batch: int, length: int, dtype: Any) -> NoReturn:
        """There is none."""
        raise NotImplementedError("a foreign model has no cached decoding")

    def cached_block(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There is none."""
        raise NotImplementedError("a foreign model has no cached decoding")

    def _positions(self, x: jax.Array) -> tuple[int, ...]:
        """Returns the axes between samples and channels; one axis where fewer positions than all are given."""
        between = self.item_shape[:-1]
        return between if math.prod(between) == x.shape[1] else (x.shape[1],)

    def _observed(self, observer: Observer, found: Mapping[str, TracedProduct], group: str) -> Any:
        product, paths = found[group], self.input_groups[group]
        residual = product.residual if len(paths) == 1 else None
        return observer(group, product.x, residual, None)

    def traced_products(self) -> list[TracedProduct]:
        """Returns the products of a block, by shapes alone; `x` and `residual` mean nothing after it."""
        shapes = {path: pytrees.shape_struct(shape, jnp.float32) for path, shape in self.block_shapes(0).items()}
        x = pytrees.shape_struct((_TRACED_SAMPLES, *self.item_shape), self.dtype)
        products: list[TracedProduct] = []

        def traced(params: Params, x: jax.Array) -> jax.Array:
            y, found = self._trace(params, x)
            products.extend(found)
            return y

        jax.eval_shape(traced, trees.unflatten(shapes), x)
        return products

    def _trace(self, params: Params, x: jax.Array) -> tuple[jax.Array, list[TracedProduct]]:
        trace = ProductTrace()
        y = self._run(params, x, trace)
        return y, trace.products

    def _run(self, params: Params, x: jax.Array, trace: ProductTrace | None) -> jax.Array:
        """Returns y; the products by kernels are computed as x @ W, and noted where there is a trace."""
        function, arrays = self.by_arrays(x)
        closed, flat = jax.make_jaxpr(function)(*arrays), trees.flatten(params)
        paths = [path for path, leaf in self.form.leaves.items() if is_parameter(leaf)]
        values = [self._value(path, flat[path], trace is not None) for path in paths]
        (y,), _ = evaluate(closed.jaxpr, closed.consts, [*values, x], trace=trace)
        result: jax.Array = dense(y)
        return result

    def by_arrays(self, x: Any) -> tuple[Callable[..., Any], list[Any]]:
        """Returns (the host's block as a function of its parameters, one after another, and x; their shapes and x)."""
        block = jax.tree.unflatten(self.form.structure, list(self.form.leaves.values()))
        return pytrees.by_arrays(self.apply, (block, x), is_parameter)

    def _value(self, path: str, leaf: Any, traced: bool) -> Any:
        host = self.form.kernels.get(path)
        if isinstance(leaf, CodebookArray):
            return TracedKernel.of(dataclasses.replace(leaf, host=host))
        if host is not None and traced:
            return TracedKernel.of_matrix(host.from_matrix(leaf), host, path)
        return self.form.leaf(path, leaf)


def read_form(block: Any, kernels: Mapping[str, HostAxes]) -> BlockForm:
    """Returns the form of a block; `kernels` are the axes of those that are compressed, by path."""
    structure = jax.tree.structure(block, is_leaf=pytrees.is_codebook_array)
    leaves = {path: _shape_of(leaf) for path, leaf in pytrees.iterate(block)}
    return BlockForm(structure, leaves, dict(kernels))


def check_products(model: ForeignModel) -> None:
    """Raises InputError unless a product of the block reads each kernel, once for every position."""
    found = model.traced_products()
    products = {product.name: product for product in found}
    rows = math.prod((_TRACED_SAMPLES, *model.item_shape[:-1]))
    for path in model.form.kernels:
        if path not in products:
            raise InputError(
                f"{path}: no product x @ W of the block reads it with these axes; let no rule match it, or correct the "
                "rule's axes"
            )
        if sum(product.name == path for product in found) > 1:
            raise InputError(f"{path} is multiplied more than once in a block; let no rule match it")
        shape = products[path].x.shape
        if math.prod(shape[:-1]) != rows or (len(shape) > 1 and shape[0] not in (_TRACED_SAMPLES, rows)):
            raise InputError(
                f"{path}: its product reads {shape} of {_TRACED_SAMPLES} samples of {model.item_shape}; only kernels "
                "that read every position once can be calibrated"
            )


def _first_of_each(products: Sequence[TracedProduct]) -> list[TracedProduct]:
    first: dict[str, TracedProduct] = {}
    for product in products:
        first.setdefault(product.name, product)
    return list(first.values())


def _shape_of(leaf: Any) -> Any:
    return pytrees.shape_struct(leaf.shape, leaf.dtype) if is_parameter(leaf) else leaf


def is_parameter(leaf: Any) -> bool:
    """Returns whether a leaf is an array of numbers; keys, flags and functions are none."""
    if not isinstance(leaf, CodebookArray | jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return False
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
