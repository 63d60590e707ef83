"""A jaxpr evaluated with some of its arrays as TracedKernels: products by them are computed as x @ W.

Equations without a kernel run as they are. A kernel goes through what only moves its axes, through nested programs,
`jax.checkpoint` and `lax.scan`; anything else gets the dense array. Knows no framework.
"""

import contextlib
import contextvars
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from cluscomp_jax.core.caller_mesh import explicit_mesh, partitioned, split_of_type
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError
from cluscomp_jax.tracing.contraction import Contraction, hindrance, multiply, read_contraction
from cluscomp_jax.tracing.kernel import NamedMatrix, TracedKernel
from cluscomp_jax.tracing.lookup import look_up
from cluscomp_jax.tracing.products import ProductTrace
from pallas_kernels import _compat

_LOG = logging.getLogger(__name__)
Observer = Callable[[str, jax.Array], Any]
"""Called as observer(name, x [..., d_in]) before a product by a NamedMatrix; its results are added up by name."""


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["places"])
@dataclasses.dataclass(frozen=True)
class Record:
    """What an observer made of the inputs of one kernel.

    Attributes:
      places: the stacked axes of the kernel that `value` has in front, by their places.
      value: pytree of arrays.
    """

    places: tuple[tuple[int, ...], ...]
    value: Any

    def scanned(self, place: tuple[int, ...] | None) -> "Record":
        """Returns the record of a whole scan, whose iterations are the first axis.

        Args:
          place: of the stacked axis that the scan takes apart; None: it uses the same matrices in every iteration, and
            what was observed is added up.
        """
        if place is None:
            return Record(self.places, jax.tree.map(partial(jnp.sum, axis=0), self.value))
        return Record((place, *self.places), self.value)


Records = dict[str, Record]


@dataclasses.dataclass
class ProductCount:
    """How many products of a traced program are computed from codebooks, and how many of decoded kernels.

    A product in a `lax.scan` counts once, and a program that JAX has compiled already is not traced again.
    """

    served: int = 0
    decoded: int = 0


_COUNTS: contextvars.ContextVar[ProductCount | None] = contextvars.ContextVar("product_count", default=None)


@contextlib.contextmanager
def count_products() -> Iterator[ProductCount]:
    """Counts the products by kernels in what is traced inside."""
    count = ProductCount()
    token = _COUNTS.set(count)
    try:
        yield count
    finally:
        _COUNTS.reset(token)


def count_product(*, served: bool, why: str = "") -> None:
    """Adds one product to the innermost `count_products`; the log has why a kernel is decoded."""
    count = _COUNTS.get()
    if count is not None:
        count.served, count.decoded = count.served + served, count.decoded + (not served)
    if not served:
        _LOG.info("a kernel is decoded before its product: %s", why)


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    observer: Observer | None = None,
    trace: ProductTrace | None = None,
) -> Any:
    """Returns (the outputs, {name: records}) of a jaxpr; outputs can be TracedKernels.

    Args:
      jaxpr: open; its constants in `consts`.
      args: arrays and TracedKernels.
      observer: sees the input of every product by a NamedMatrix.
      trace: notes the products outside of `lax.scan`; `jax.checkpoint` then recomputes nothing.
    """
    state = _Evaluation(observer, trace)
    outs = state.run(jaxpr, consts, args)
    return outs, state.records


def dense(value: Any, var: Any = None) -> Any:
    """Returns the array of a TracedKernel, split over an Explicit mesh as `var` is, and anything else as it is."""
    if not isinstance(value, TracedKernel):
        return value
    return value.dense(None if var is None else split_of_type(var.aval))


def dense_each(values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Returns `dense` of each value and its variable."""
    return [dense(value, var) for value, var in zip(values, variables, strict=True)]


@dataclasses.dataclass
class _Evaluation:
    observer: Observer | None
    trace: ProductTrace | None = None
    records: Records = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, core.Literal) else env[var]

        last = {var: eqn for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, core.Literal)}
        kept = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            if any(isinstance(value, TracedKernel) for value in values):
                outs = self._with_kernels(eqn, values)
            else:
                outs = self._bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
            for var in (*eqn.invars, *eqn.outvars):
                if not isinstance(var, core.Literal) and var not in kept and last.get(var, eqn) is eqn:
                    env.pop(var, None)  # outside jit it would be alive to the end
        return [read(var) for var in jaxpr.outvars]

    def _with_kernels(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name == "dot_general":
            return self._dot_general(eqn, values)
        if name in _MOVES and isinstance(values[0], TracedKernel):
            moved = _MOVES[name](values[0], values[1:], eqn.params)
            if moved is not None:
                return [moved]
            count_product(served=False, why=f"{name} cuts or repeats its matrices")
        if name == "gather" and isinstance(values[0], TracedKernel) and explicit_mesh(*values) is None:
            found = look_up(values[0], dense(values[1]), eqn.params)
            if found is not None:
                count_product(served=True)
                return [found]
        if name in _NESTED:
            inner = eqn.params[_NESTED[name]]
            return self.run(inner.jaxpr, inner.consts, values)
        if name == "scan":
            return self._scan(eqn, values)
        if name in ("remat2", "checkpoint"):
            return self._checkpoint(eqn, values) if self.trace is None else self.run(eqn.params["jaxpr"], (), values)
        if name not in _MOVES or not isinstance(values[0], TracedKernel):
            count_product(served=False, why=f"{name} is no product")
        return self._bind(eqn, dense_each(values, eqn.invars))

    def _dot_general(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        first = isinstance(values[0], TracedKernel)
        kernel, x = values if first else values[::-1]
        c, x = read_contraction(eqn.params["dimension_numbers"], first), dense(x, eqn.invars[1 if first else 0])
        why = hindrance(kernel, x, c)
        if why is not None:
            count_product(served=False, why=why)
            return self._bind(eqn, dense_each(values, eqn.invars))
        count_product(served=True)
        out = eqn.outvars[0].aval
        with jax.numpy_dtype_promotion("standard"):
            common = jnp.promote_types(x.dtype, kernel.dtype)
        kernel, x = kernel.cast(common), jnp.asarray(x).astype(common)
        with _precision(eqn.params["precision"]):
            if explicit_mesh(kernel, x) is not None and isinstance(kernel.payload, CodebookArray):
                return [_multiply_on_mesh(kernel, x, c, out)]
            y, *noted = multiply(kernel, x, c, out.dtype, self._product)
        if isinstance(kernel.payload, NamedMatrix):
            if self.observer is not None:
                self._record(kernel.payload.name, Record(tuple(a.place for a in kernel.stack), noted.pop()))
            if self.trace is not None and noted:
                self.trace.note_product(kernel, c, noted[0], x, y)
        return [y]

    def _product(self, kernel: TracedKernel, x: jax.Array, out_dtype: Any) -> tuple[Any, ...]:
        """Returns x @ W, then x where it is traced, then what the observer makes of it."""
        found = [kernel.product(x, out_dtype)]
        if self.trace is not None and isinstance(kernel.payload, NamedMatrix):
            found.append(x)
        if self.observer is not None and isinstance(kernel.payload, NamedMatrix):
            found.append(self.observer(kernel.payload.name, x))
        return tuple(found)

    def _bind(self, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
        outs = _bind(eqn, values)
        if self.trace is not None:
            self.trace.note_equation(eqn, values, outs)
        return outs

    def _record(self, name: str, found: Record) -> None:
        before = self.records.get(name, found)
        if before.places != found.places:
            raise InputError(
                f"{name} is multiplied in parts, along different stacked axes; its inputs cannot be added up"
            )
        value = found.value if before is found else jax.tree.map(jnp.add, before.value, found.value)
        self.records[name] = Record(found.places, value)

    def _merge(self, records: Records) -> None:
        for name, value in records.items():
            self._record(name, value)

    def _checkpoint(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        def inside(*values: Any) -> Any:
            return evaluate(eqn.params["jaxpr"], (), values, self.observer)

        kept = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        outs, records = jax.checkpoint(inside, **kept)(*values)
        self._merge(records)
        return list(outs)

    def _scan(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        params = eqn.params
        consts, start, xs = _compat.scan_inputs(params, values)
        carry = dense_each(start, params["jaxpr"].jaxpr.invars[len(consts) : len(consts) + len(start)])
        scanned = [_leading(value) for value in xs]
        along = {
            kernel.payload.name: kernel.dims[0][0].place
            for kernel, value in zip(xs, scanned, strict=True)
            if isinstance(value, TracedKernel) and isinstance(kernel.payload, NamedMatrix)
        }

        def body(carry: Any, xs: Any) -> Any:
            outs, records = evaluate(
                params["jaxpr"].jaxpr, params["jaxpr"].consts, (*consts, *carry, *xs), self.observer
            )
            outs = dense_each(outs, params["jaxpr"].jaxpr.outvars)
            return tuple(outs[: len(start)]), (outs[len(start) :], records)

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, (ys, records) = jax.lax.scan(body, tuple(carry), tuple(scanned), **options)  # type: ignore[arg-type]
        self._merge({name: record.scanned(along.get(name)) for name, record in records.items()})
        return [*carry, *ys]


def _multiply_on_mesh(kernel: TracedKernel, x: jax.Array, c: Contraction, out: Any) -> jax.Array:
    """Returns the product with the sharding of its type `out`, on a mesh with Explicit axes."""

    def product(kernel: TracedKernel, x: jax.Array) -> jax.Array:
        y: jax.Array = multiply(kernel, x, c, out.dtype, lambda kernel, x, dtype: (kernel.product(x, dtype),))[0]
        return y

    return partitioned(product, (kernel, x), split_of_type(out))


def _leading(value: Any) -> Any:
    if not isinstance(value, TracedKernel):
        return value
    return value.leading() or value.dense()


def _bind(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


@contextlib.contextmanager
def _precision(precision: Any) -> Iterator[None]:
    """The products inside have the precision of a dot_general, where it asks for one."""
    wanted = precision[0] if isinstance(precision, tuple) else precision
    if wanted is None or not isinstance(wanted, jax.lax.Precision):
        yield
        return
    with jax.default_matmul_precision(wanted.name.lower()):
        yield


def _slice(kernel: TracedKernel, _: Any, params: Any) -> TracedKernel | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    moved: TracedKernel | None = kernel
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        size = -(-(limit - start) // stride)
        if moved is not None and size != kernel.shape[axis]:
            moved = moved.sliced(axis, int(start), size, stride)
    return moved


def _dynamic_slice(kernel: TracedKernel, starts: Sequence[Any], params: Any) -> TracedKernel | None:
    moved: TracedKernel | None = kernel
    for axis, size in enumerate(params["slice_sizes"]):
        if moved is not None and size != kernel.shape[axis]:
            start = jnp.clip(jnp.asarray(starts[axis]), 0, kernel.shape[axis] - size)
            moved = moved.sliced(axis, start, size)
    return moved


def _same(kernel: TracedKernel, _: Any, params: Any) -> TracedKernel:
    return kernel


_MOVES: dict[str, Callable[[TracedKernel, Sequence[Any], Any], TracedKernel | None]] = {
    "convert_element_type": lambda kernel, _, p: kernel.cast(p["new_dtype"]),
    "transpose": lambda kernel, _, p: kernel.transpose(p["permutation"]),
    "reshape": lambda kernel, _, p: None if p["dimensions"] else kernel.reshape(p["new_sizes"]),
    "squeeze": lambda kernel, _, p: kernel.squeeze(p["dimensions"]),
    "broadcast_in_dim": lambda kernel, _, p: kernel.broadcast(p["shape"], p["broadcast_dimensions"]),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "copy": _same,
    "copy_p": _same,
    "sharding_constraint": _same,
}
"""Primitives that only move a kernel's axes, or take some of its stacked matrices."""

_NESTED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Primitives that run another program, and the parameter that has it."""
