"""Which products a program has by its kernels: what each reads, and what its result is added to.

Knows values of one evaluation and the primitives that move them, not what a model is.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax

from cluscomp_jax.tracing.contraction import Contraction
from cluscomp_jax.tracing.kernel import NamedMatrix, TracedKernel

_MOVES = frozenset({"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim", "copy", "copy_p"})
"""Primitives of one array that keep its numbers."""


@dataclasses.dataclass
class TracedProduct:
    """One product x @ W.

    Attributes:
      name: path of the kernel.
      x: [..., d_in], what it reads.
      source: equal for products that read the same array in the same way.
      residual: what the result is added to after moves and biases, of the same shape as the sum; None: nothing.
    """

    name: str
    x: jax.Array
    source: Hashable
    residual: jax.Array | None = None


class ProductTrace:
    """Notes the products by NamedMatrix kernels in one evaluation; `products` has them in order."""

    def __init__(self) -> None:
        self.products: list[TracedProduct] = []
        self._kept: list[Any] = []  # an id is that of one value as long as the value is alive
        self._source: dict[int, Hashable] = {}
        # A result, moved or not, and how many axes of the kernel are before those of x.
        self._result_of: dict[int, tuple[TracedProduct, int]] = {}
        self._spread: set[int] = set()

    def note_product(self, kernel: TracedKernel, c: Contraction, x: jax.Array, read: Any, result: Any) -> None:
        """Notes a product by a NamedMatrix: x as it is multiplied, `read` as the program has it, and the result."""
        assert isinstance(kernel.payload, NamedMatrix)
        self._kept += [read, result]
        inner = tuple(atom.place for axis in c.w_axes for atom in kernel.dims[axis])
        product = TracedProduct(kernel.payload.name, x, (self._source_of(read), c.x_axes, c.x_batch, inner))
        self.products.append(product)
        free = len(kernel.dims) - len(c.w_axes) - len(c.w_batch)
        self._result_of[id(result)] = product, free if c.kernel_first else 0

    def note_equation(self, eqn: Any, values: Sequence[Any], outs: Sequence[Any]) -> None:
        """Notes an equation without kernels."""
        name = eqn.primitive.name
        if name in _MOVES:
            self._note_move(eqn, values[0], outs[0])
        elif name in ("add", "add_any"):
            for one, other in (values, values[::-1]):
                self._note_sum(one, other, outs[0])

    def _note_move(self, eqn: Any, value: Any, out: Any) -> None:
        self._kept += [value, out]
        how = str(sorted((key, str(param)) for key, param in eqn.params.items()))
        self._source[id(out)] = (eqn.primitive.name, how, self._source_of(value))
        if id(value) in self._result_of:
            self._note_moved_result(eqn, value, out)
        if eqn.primitive.name == "broadcast_in_dim" or id(value) in self._spread:
            self._spread.add(id(out))

    def _note_moved_result(self, eqn: Any, value: Any, out: Any) -> None:
        """Follows a result whose rows keep their order; their axes may come to the front."""
        product, before = self._result_of[id(value)]
        if eqn.primitive.name == "transpose":
            if tuple(eqn.params["permutation"]) == (*range(before, value.ndim), *range(before)):
                self._result_of[id(out)] = product, 0
        elif before == 0 or eqn.primitive.name == "convert_element_type":
            self._result_of[id(out)] = product, before

    def _note_sum(self, one: Any, other: Any, out: Any) -> None:
        product, before = self._result_of.get(id(one), (None, 0))
        if product is None or id(other) in self._result_of:
            return
        self._kept += [one, other, out]
        if id(other) in self._spread or getattr(other, "shape", ()) != one.shape:
            self._result_of[id(out)] = product, before  # a bias
        elif product.residual is None and before == 0:
            product.residual = other

    def _source_of(self, value: Any) -> Hashable:
        return self._source.get(id(value), id(value))
