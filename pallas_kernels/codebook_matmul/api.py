"""The public op: y = x @ W with W stored as codebook and index, its gradients, and the choice of implementation."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import implementation as choice
from pallas_kernels.codebook_matmul import config, definition
from pallas_kernels.codebook_matmul.definition import Axis
from pallas_kernels.codebook_matmul.strips import ordered_gradient
from pallas_kernels.codebook_matmul.table import key_of, tile_of
from pallas_kernels.implementation import IMPLEMENTATION, Implementation

MAX_CODES = 65536
MAX_GROUP = 32
ATOMIC_GRADIENTS: Any = jax.make_user_context(False)  # type: ignore[no-untyped-call]
"""What `atomic_gradients=None` means, likewise."""
_KERNEL_DTYPES = ("float32", "bfloat16", "float16")
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Op:
    """What is static in a call; see `codebook_matmul`."""

    shape: tuple[int, int]
    axis: Axis
    step_bits: int | None
    implementation: Implementation | None
    atomic_gradients: bool


def codebook_matmul(
    x: jax.Array,
    codebook: jax.Array,
    index: jax.Array,
    *,
    shape: tuple[int, int],
    axis: Axis,
    step_bits: int | None = None,
    implementation: Implementation | None = None,
    atomic_gradients: bool | None = None,
) -> jax.Array:
    """Returns x @ W, shape [..., d_out], in the dtype of x, W decoded from codebook and index.

    Args:
      x: [..., d_in], floating.
      codebook: [n, g], floating, n <= 65536, g <= 32; cast to the dtype of x before the product, as a dense kernel is.
      index: uint8 or uint16, [d_in, ceil(d_out/g)] for axis "out", [ceil(d_in/g), d_out] for "in"; entries < n,
        which is not checked. With `step_bits`: uint32, [d_in, words] for axis "out", [words, d_out] for "in".
      shape: (d_in, d_out).
      axis: the axis of W that the codes run along.
      step_bits: b of a trellis index, 1 to L where n = 2^L: the codes are windows of a stream of bits
        (`definition.codes_of`). None: the index has the codes themselves.
      implementation: "definition" decodes W, then multiplies. "triton" are the GPU kernels, which never hold W;
        "interpret" runs the same GPU kernels step by step on any device, for tests. None: as `IMPLEMENTATION` says; if
        that says None, the GPU kernels where the program is compiled for a CUDA device and they can serve it, else the
        definition. The results of all agree within the rounding of the dtype of x.
      atomic_gradients: the GPU kernels add up the codebook's gradient by atomic additions. That saves sorting and
        memory; but two runs differ in the last bits. False: every result is reproducible. None: as `ATOMIC_GRADIENTS`
        says.

    Differentiable in x and codebook; the index has no gradient.

    Raises:
      ValueError: a shape, dtype or option that does not fit the others.
      NotImplementedError: the GPU kernels were asked for by name and cannot serve this; the text says why.
    """
    implementation = IMPLEMENTATION.value if implementation is None else implementation
    fast = ATOMIC_GRADIENTS.value if atomic_gradients is None else atomic_gradients
    op = _Op(shape, axis, step_bits, implementation, fast)
    _check(op, x, codebook, index)
    if implementation == "triton" and (reason := _hindrance(x)):
        raise NotImplementedError(f"codebook_matmul: no GPU kernel: {reason}")
    return _matmul(op, x, codebook, index)


def _check(op: _Op, x: Any, codebook: Any, index: Any) -> None:
    """Raises ValueError unless the arguments fit each other."""
    shape, axis, implementation, step_bits = op.shape, op.axis, op.implementation, op.step_bits

    def require(holds: bool, text: str) -> None:
        if not holds:
            raise ValueError(f"codebook_matmul: {text}")

    require(axis in get_args(Axis), f"axis is {axis!r}; it must be 'out' or 'in'")
    known = (None, *get_args(Implementation))
    require(implementation in known, f"implementation is {implementation!r}; it must be one of {known}")
    for name, array in (("x", x), ("codebook", codebook)):
        require(jnp.issubdtype(array.dtype, jnp.floating), f"{name} is {array.dtype}; it must be floating")
    dtypes, names = ((jnp.uint8, jnp.uint16), "uint8 or uint16") if step_bits is None else ((jnp.uint32,), "uint32")
    require(index.dtype in dtypes, f"the index is {index.dtype}; it must be {names}")
    require(codebook.ndim == 2, f"the codebook has shape {codebook.shape}; it must be [codes, group]")
    n, g = codebook.shape
    legal = 1 <= n <= MAX_CODES and 1 <= g <= MAX_GROUP
    require(legal, f"the codebook is [{n}, {g}]; codes must be 1 to {MAX_CODES}, group 1 to {MAX_GROUP}")
    require(x.ndim >= 1 and x.shape[-1] == shape[0], f"x has shape {x.shape}, the matrix takes {shape[0]} channels")
    pieces = (shape[0], -(-shape[1] // g)) if axis == "out" else (-(-shape[0] // g), shape[1])
    if step_bits is not None:
        window = definition.window_bits(n)
        require(n == 1 << window, f"the codebook has {n} codes; a trellis index takes a power of two")
        require(1 <= step_bits <= window, f"step_bits is {step_bits}; windows of {window} bits take 1 to {window}")
        words = definition.stream_words(pieces[1 if axis == "out" else 0], n, step_bits)
        pieces = (shape[0], words) if axis == "out" else (words, shape[1])
    fits = tuple(index.shape) == pieces
    require(fits, f"the index has shape {tuple(index.shape)}, {shape} cut by {g} along {axis!r} needs {pieces}")


def _kernels() -> Any:
    """Returns the module of the GPU kernels; its import takes a moment, which a CPU program saves."""
    from pallas_kernels.codebook_matmul import triton

    return triton


def _hindrance(x: jax.Array) -> str | None:
    """Returns why the GPU kernels cannot serve x, or None."""
    if x.dtype.name not in _KERNEL_DTYPES:
        return f"x is {x.dtype}, the GPU kernels take {', '.join(_KERNEL_DTYPES)}"
    if 0 in x.shape:
        return f"x has shape {x.shape}, there is nothing to multiply"
    return choice.no_backend()


@functools.cache
def _log_once(reason: str) -> None:
    _LOG.warning("codebook_matmul: W is decoded instead of using the GPU kernels: %s", reason)


def _choose(
    op: _Op, x: jax.Array, plain: Callable[..., jax.Array], kernels: Callable[..., jax.Array], *args: jax.Array
) -> jax.Array:
    """Returns plain(*args) or kernels(*args), whichever `op.implementation` means."""
    if choice.only_definition(op.implementation):
        return plain(*args)
    if op.implementation is not None:
        return kernels(*args)
    reason = _hindrance(x)
    if reason:
        _log_once(reason)
        return plain(*args)
    chosen: jax.Array = jax.lax.platform_dependent(*args, cuda=kernels, default=plain)
    return chosen


def _product(op: _Op, a: jax.Array, codebook: jax.Array, index: jax.Array, *, transposed: bool) -> jax.Array:
    """Returns a @ W, or a @ W.T if `transposed`."""
    depth, width = op.shape[::-1] if transposed else op.shape
    (n, g), m = codebook.shape, math.prod(a.shape[:-1])

    def plain(a: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
        codebook = codebook.astype(a.dtype)
        weight = definition.decode(codebook, index, shape=op.shape, axis=op.axis, step_bits=op.step_bits)
        return a @ (weight.T if transposed else weight)

    def kernels(a: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
        steps = None if op.step_bits is None else config.Steps(op.step_bits, (op.axis == "out") != transposed)
        tile = tile_of(key_of(m, depth, width, g=g, n=n, itemsize=a.dtype.itemsize, steps=steps))
        fixed = {"shape": op.shape, "axis": op.axis, "step_bits": op.step_bits, "transposed": transposed, "tile": tile}
        interpret = op.implementation == "interpret"
        y: jax.Array = _kernels().gemm(a.reshape(m, depth), codebook, index, **fixed, interpret=interpret)
        return y.reshape(*a.shape[:-1], width)

    return _choose(op, a, plain, kernels, a, codebook, index)


def _codebook_gradient(op: _Op, x: jax.Array, dy: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the gradient [n, g], float32, of the codebook."""
    n, g = codebook.shape
    cut: dict[str, Any] = {"num_codes": n, "g": g, "axis": op.axis, "step_bits": op.step_bits}

    def plain(x: jax.Array, dy: jax.Array, index: jax.Array) -> jax.Array:
        d_weight = jnp.matmul(x.T, dy, preferred_element_type=jnp.float32)
        codes = definition.codes_of(index, shape=op.shape, **cut)
        return definition.codebook_gradient(d_weight, codes, num_codes=n, g=g, axis=op.axis)

    def kernels(x: jax.Array, dy: jax.Array, index: jax.Array) -> jax.Array:
        module, interpret = _kernels(), op.implementation == "interpret"
        total: jax.Array
        if op.atomic_gradients:
            tile = config.scatter_config(x.dtype.itemsize)
            total = module.scatter_gradient(x, dy, index, **cut, tile=tile, interpret=interpret)
            return total
        segment_sum = functools.partial(module.segment_sum, tile=config.segment_config(n, g), interpret=interpret)
        return ordered_gradient(x, dy, index, segment_sum, **cut)

    x, dy = x.reshape(-1, op.shape[0]), dy.reshape(-1, op.shape[1])
    return _choose(op, x, plain, kernels, x, dy, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(op: _Op, x: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
    return _product(op, x, codebook, index, transposed=False)


def _forward(op: _Op, x: jax.Array, codebook: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(op, x, codebook, index, transposed=False), (x, codebook, index)


def _backward(op: _Op, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array, np.ndarray]:
    x, codebook, index = saved
    d_codebook = _codebook_gradient(op, x, dy, codebook, index).astype(codebook.dtype)
    if not choice.only_definition(op.implementation):
        # Left to itself XLA may put the codebooks' gradients off to the end, which keeps the inputs of all matrices
        # alive; done first, x is free before dx takes its place.
        dy, d_codebook = jax.lax.optimization_barrier((dy, d_codebook))  # type: ignore[no-untyped-call]
    dx = _product(op, dy, codebook, index, transposed=True).astype(x.dtype)
    return dx, d_codebook, np.zeros(index.shape, jax.dtypes.float0)


_matmul.defvjp(_forward, _backward)
