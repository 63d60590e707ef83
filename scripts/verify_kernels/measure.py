"""Values and times of the GPU kernels on the GPU present, next to XLA's decode-and-multiply and a 16-bit product."""

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
from pallas_kernels.codebook_matmul.config import DECODE_ROWS, GemmConfig

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
      kernel_us: the GPU kernel, or for a gradient the op's way to it.
      decoded_us: XLA, W decoded in every call.
      dense_us: XLA, W dense in the dtype of x.
    """

    error: float
    kernel_us: float
    decoded_us: float
    dense_us: float


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a case.

    Attributes:
      copies: products of one call of `kernel`, `decoded` and `dense`, each with an index and a weight of its own.
      kernel, decoded, dense: take (xs, codebook, indices, dys, weights); all but the codebook are tuples of `copies`.
      exact: takes (x, codebook, index, dy), x, codebook and dy in float32.
    """

    copies: int
    kernel: Any
    decoded: Any
    dense: Any
    exact: Any


def compile_case(case: Case, *, implementation: Any = "triton", calls: int = _CALLS) -> Programs:
    """Returns the programs of a case for the default device. Holds no array there; threads may compile side by side.

    Args:
      implementation: of `codebook_matmul`, for `kernel`.
      calls: copies that a program of a few rows has. A single such product takes less time than its launch, and its
        index would stay in the cache from one call to the next.
    """
    cut: dict[str, Any] = {"shape": case.shape, "axis": case.axis, "step_bits": case.step_bits}
    fixed = cut | {"atomic_gradients": case.kernel == "scatter"}

    def result(x: jax.Array, codebook: jax.Array, index: jax.Array, dy: jax.Array, how: Any) -> jax.Array:
        y, pull = jax.vjp(lambda x, c: codebook_matmul(x, c, index, **fixed, implementation=how), x, codebook)
        chosen: jax.Array = y if case.kernel == "forward" else pull(dy)[0 if case.kernel == "dx" else 1]
        return chosen

    def dense(x: jax.Array, dy: jax.Array, weight: jax.Array) -> jax.Array:
        return {"forward": lambda: x @ weight, "dx": lambda: dy @ weight.T}.get(case.kernel, lambda: x.T @ dy)()

    def compiled(one: Callable[..., jax.Array]) -> Any:
        def program(xs: Any, codebook: Any, indices: Any, dys: Any, weights: Any) -> tuple[jax.Array, ...]:
            each = zip(xs, indices, dys, weights, strict=True)
            return tuple(one(x, codebook, index, dy, weight) for x, index, dy, weight in each)

        return jax.jit(program).lower(*shapes).compile()

    copies = calls if case.m <= DECODE_ROWS else 1
    shapes = jax.eval_shape(functools.partial(_arguments, case, copies))
    xs, codebook, indices, dys, _ = shapes
    single = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32),  # type: ignore[no-untyped-call]
        (xs[0], codebook, dys[0]),
    )
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(functools.partial(result, how="definition")).lower(*single[:2], indices[0], single[2]).compile()
    return Programs(
        copies,
        compiled(lambda x, codebook, index, dy, weight: result(x, codebook, index, dy, implementation)),
        compiled(lambda x, codebook, index, dy, weight: result(x, codebook, index, dy, "definition")),
        compiled(lambda x, codebook, index, dy, weight: dense(x, dy, weight)),
        exact,
    )


def measure(
    case: Case,
    *,
    implementation: Any = "triton",
    calls: int = _CALLS,
    repeats: int = _REPEATS,
    programs: Programs | None = None,
) -> Measured:
    """Returns what the case's op gives and takes on the default device; "segment" means the whole ordered gradient.

    Args:
      implementation: of `codebook_matmul`.
      calls: of each product between two looks at the clock.
      repeats: looks at the clock, of which the median counts.
      programs: of `compile_case`; None: they are compiled here.
    """
    programs = programs or compile_case(case, implementation=implementation, calls=calls)
    arguments = _arguments(case, programs.copies)
    xs, codebook, indices, dys, _ = arguments
    x, c, dy = (array.astype(jnp.float32) for array in (xs[0], codebook, dys[0]))
    exact = programs.exact(x, c, indices[0], dy)
    difference = jnp.abs(programs.kernel(*arguments)[0].astype(jnp.float32) - exact)
    error = float(jnp.max(difference) / jnp.max(jnp.abs(exact)))
    del x, c, dy, exact, difference

    def microseconds(program: Any) -> float:
        return _microseconds(lambda: program(*arguments), -(-calls // programs.copies), repeats) / programs.copies

    return Measured(error, microseconds(programs.kernel), microseconds(programs.decoded), microseconds(programs.dense))


def _arguments(case: Case, copies: int) -> tuple[Any, ...]:
    """Returns (xs, codebook, indices, dys, weights), as `Programs` takes them."""
    d_in, d_out = case.shape
    codebook = jax.random.normal(jax.random.key(0), (case.n, case.g), case.dtype)
    xs, indices, dys, weights = [], [], [], []
    for i in range(copies):
        keys = jax.random.split(jax.random.key(1 + i), 3)
        xs.append(jax.random.normal(keys[0], (case.m, d_in), case.dtype))
        dys.append(jax.random.normal(keys[1], (case.m, d_out), case.dtype))
        if case.step_bits is None:
            codes = jax.random.randint(keys[2], case.index_shape, 0, case.n).astype(case.index_dtype)
        else:  # any words are streams
            codes = jax.random.bits(keys[2], case.index_shape, case.index_dtype)
        indices.append(codes)
        weights.append(decode(codebook, codes, shape=case.shape, axis=case.axis, step_bits=case.step_bits))
    return tuple(xs), codebook, tuple(indices), tuple(dys), tuple(weights)


def _microseconds(call: Callable[[], Any], calls: int, repeats: int = _REPEATS) -> float:
    """Returns the median time of a call, after one that warms up."""
    jax.block_until_ready(call())  # type: ignore[no-untyped-call]
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)  # type: ignore[no-untyped-call]
        times.append((time.perf_counter() - began) / calls)
    return 1e6 * statistics.median(times)


def compile_tile(case: Case, tile: GemmConfig, *, calls: int = _CALLS, interpret: bool = False) -> Any:
    """Returns the program of a product with given tiles, for `time_programs`; None where the compiler refuses them."""
    cut: dict[str, Any] = {"shape": case.shape, "axis": case.axis, "step_bits": case.step_bits}
    fixed = cut | {"transposed": case.kernel == "dx", "tile": tile}
    product: Any = functools.partial(triton.gemm, **fixed, interpret=interpret)

    def program(xs: Any, codebook: Any, indices: Any, dys: Any, weights: Any) -> tuple[jax.Array, ...]:
        rows = dys if case.kernel == "dx" else xs
        return tuple(product(a, codebook, index) for a, index in zip(rows, indices, strict=True))

    copies = calls if case.m <= DECODE_ROWS else 1
    try:
        return jax.jit(program).lower(*jax.eval_shape(functools.partial(_arguments, case, copies))).compile()
    except jax.errors.JaxRuntimeError as error:
        _LOG.info("%s with %s: %s", case.name, tile, error)
        return None


def time_programs(case: Case, programs: list[Any], *, calls: int = _CALLS, repeats: int = _REPEATS) -> list[float]:
    """Returns the seconds of a product with each of the programs of `compile_tile`, infinity for None."""
    copies = calls if case.m <= DECODE_ROWS else 1
    arguments = _arguments(case, copies)
    found = []
    for program in programs:
        try:
            once = functools.partial(program, *arguments) if program is not None else None
            took = math.inf if once is None else _microseconds(once, -(-calls // copies), repeats) / copies / 1e6
        except jax.errors.JaxRuntimeError as error:  # more shared memory than the card has is an error of the launch
            _LOG.info("%s: %s", case.name, error)
            took = math.inf
        found.append(took)
    return found


def time_tile(case: Case, tile: GemmConfig) -> float:
    """Returns the seconds of a product with given tiles, infinity where the compiler refuses them."""
    (took,) = time_programs(case, [compile_tile(case, tile)])
    return took


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
