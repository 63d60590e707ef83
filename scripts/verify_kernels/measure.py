"""Values and times of the kernels on the GPU that is here, beside XLA's decode-and-multiply and a 16-bit product."""

import dataclasses
import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_matmul import codebook_matmul, decode, triton
from pallas_kernels.codebook_matmul.config import GemmConfig
from .cases import Case

LIMITS = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 1e-3}
_LOG = logging.getLogger(__name__)
_CALLS = 10
_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a case did here; times are medians, in microseconds a call.

    Attributes:
      error: largest difference from the definition in float32, over its largest value.
      kernel_us: the kernel, or for a gradient the op's way to it.
      decoded_us: XLA, W decoded in every call.
      dense_us: XLA, W dense in the dtype of x.
    """

    error: float
    kernel_us: float
    decoded_us: float
    dense_us: float


def measure(case: Case, *, implementation: Any = "triton", calls: int = _CALLS) -> Measured:
    """Returns what the case's op gives and takes on the default device; "segment" means the whole ordered gradient."""
    x, codebook, index, dy = _arrays(case)
    fixed: dict[str, Any] = {"shape": case.shape, "axis": case.axis, "fast_gradients": case.kernel == "scatter"}
    options = {"implementation": implementation} | fixed

    def result(x: jax.Array, codebook: jax.Array, dy: jax.Array, **options: Any) -> jax.Array:
        y, pull = jax.vjp(lambda x, c: codebook_matmul(x, c, index, **options), x, codebook)
        chosen: jax.Array = y if case.kernel == "forward" else pull(dy)[0 if case.kernel == "dx" else 1]
        return chosen

    def dense(x: jax.Array, dy: jax.Array, weight: jax.Array) -> jax.Array:
        return {"forward": lambda: x @ weight, "dx": lambda: dy @ weight.T}.get(case.kernel, lambda: x.T @ dy)()

    kernel = jax.jit(lambda x, c, dy: result(x, c, dy, **options))
    decoded = jax.jit(lambda x, c, dy: result(x, c, dy, **fixed, implementation="definition"))
    weight = decode(codebook, index, shape=case.shape, axis=case.axis)
    with jax.default_matmul_precision("highest"):
        exact = decoded(*(array.astype(jnp.float32) for array in (x, codebook, dy)))
    difference = jnp.abs(kernel(x, codebook, dy).astype(jnp.float32) - exact)
    return Measured(
        float(jnp.max(difference) / jnp.max(jnp.abs(exact))),
        _microseconds(lambda: kernel(x, codebook, dy), calls),
        _microseconds(lambda: decoded(x, codebook, dy), calls),
        _microseconds(lambda: jax.jit(dense)(x, dy, weight), calls),
    )


def _arrays(case: Case) -> tuple[jax.Array, ...]:
    d_in, d_out = case.shape
    keys = jax.random.split(jax.random.key(0), 4)
    pieces = (d_in, -(-d_out // case.g)) if case.axis == "out" else (-(-d_in // case.g), d_out)
    index = jax.random.randint(keys[0], pieces, 0, case.n).astype(jnp.uint8 if case.n <= 256 else jnp.uint16)
    x, codebook, dy = (
        jax.random.normal(key, shape, case.dtype)
        for key, shape in zip(keys[1:], ((case.m, d_in), (case.n, case.g), (case.m, d_out)), strict=True)
    )
    return x, codebook, index, dy


def _microseconds(call: Callable[[], jax.Array], calls: int) -> float:
    """Returns the median time of a call, after one that compiles."""
    call().block_until_ready()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            last = call()
        last.block_until_ready()
        times.append((time.perf_counter() - began) / calls)
    return 1e6 * statistics.median(times)


def time_tile(case: Case, tile: GemmConfig) -> float:
    """Returns the seconds of a product with given tiles, infinity where the compiler refuses them."""
    x, codebook, index, dy = _arrays(case)
    fixed: dict[str, Any] = {"shape": case.shape, "axis": case.axis, "transposed": case.kernel == "dx", "tile": tile}
    product = jax.jit(functools.partial(triton.gemm, **fixed))
    a = dy if case.kernel == "dx" else x
    try:
        return _microseconds(lambda: product(a, codebook, index), _CALLS) / 1e6
    except jax.errors.JaxRuntimeError as error:
        _LOG.info("%s with %s: %s", case.name, tile, error)
        return math.inf


def table(cases: list[Case]) -> Iterator[tuple[str, bool]]:
    """Yields (row of a table, whether the values are right), a head of two lines first."""
    device = jax.devices()[0].device_kind
    head = (
        f"\non {device}, jax {jax.__version__}: median microseconds a call\n| case | error | kernel | decoded | dense |"
    )
    yield head + "\n" + "|---" * 5 + "|", True
    for case in cases:
        found = measure(case)
        right = found.error <= LIMITS[case.dtype]
        times = " | ".join(f"{t:.0f}" for t in (found.kernel_us, found.decoded_us, found.dense_us))
        yield f"| {case.name} | {found.error:.1e}{'' if right else ' FAIL'} | {times} |", right
