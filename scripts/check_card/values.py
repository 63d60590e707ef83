"""The values of every GPU kernel against float64 NumPy. Shares no code with them."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from check_card.step import Step
from pallas_kernels.codebook_matmul import codebook_matmul

LIMITS = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 1e-3}
"""{dtype: largest error}, relative to the largest value, of a codebook's gradient to the sum of absolute terms."""
GROUPS = (4, 8, 16, 1, 2, 5, 6, 9, 18, 32)
KERNELS = ("forward", "few rows", "dx", "ordered gradient", "atomic gradient")
_FEW = 3


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random calls with W [d_in, d_out] of n codes of g weights along `axis`."""

    g: int
    axis: str
    dtype: str
    m: int = 70
    d_in: int = 144
    d_out: int = 200

    @property
    def n(self) -> int:
        """Codes: of 8-bit indices along one axis, of 16-bit ones along the other."""
        return 256 if self.axis == "out" else 700

    def arrays(self) -> tuple[jax.Array, ...]:
        """Returns (x, codebook, index, dy)."""
        rng = np.random.default_rng(self.g)
        pieces = (self.d_in, -(-self.d_out // self.g)) if self.axis == "out" else (-(-self.d_in // self.g), self.d_out)
        index = rng.integers(0, self.n, pieces).astype(np.uint8 if self.n <= 256 else np.uint16)
        shapes = ((self.m, self.d_in), (self.n, self.g), (self.m, self.d_out))
        x, codebook, dy = (jnp.asarray(rng.normal(size=shape), self.dtype) for shape in shapes)
        return x, codebook, jnp.asarray(index), dy


def oracle(problem: Problem, arrays: tuple[jax.Array, ...]) -> dict[str, tuple[np.ndarray, Any]]:
    """Returns {kernel: (its result in float64, what errors are relative to)}."""
    x, codebook, dy = (np.asarray(arrays[i], np.float64) for i in (0, 1, 3))
    index = np.asarray(arrays[2]).astype(np.int64)
    row, column = np.indices((problem.d_in, problem.d_out))
    along = column if problem.axis == "out" else row
    code = index[row, column // problem.g] if problem.axis == "out" else index[row // problem.g, column]
    weight = codebook[code, along % problem.g]
    gradient, terms = np.zeros((2, *codebook.shape))
    np.add.at(gradient, (code, along % problem.g), x.T @ dy)
    np.add.at(terms, (code, along % problem.g), np.abs(x).T @ np.abs(dy))
    y, dx = x @ weight, dy @ weight.T
    few = y[:_FEW]
    summed = (gradient, np.maximum(terms, 1e-30))
    results = ((y, np.abs(y).max()), (few, np.abs(few).max()), (dx, np.abs(dx).max()), summed, summed)
    return dict(zip(KERNELS, results, strict=True))


def compile_kernels(
    problem: Problem, arrays: tuple[jax.Array, ...], kernels: tuple[str, ...], implementation: str
) -> Any:
    """Returns one compiled program of these GPU kernels: (x, codebook, index, dy) -> their results."""
    how = cast(Literal["triton", "interpret"], implementation)
    axis = cast(Literal["out", "in"], problem.axis)
    shape = (problem.d_in, problem.d_out)

    def program(x: jax.Array, codebook: jax.Array, index: jax.Array, dy: jax.Array) -> list[jax.Array]:
        def product(x: jax.Array, codebook: jax.Array, fast: bool = False) -> jax.Array:
            return codebook_matmul(
                x, codebook, index, shape=shape, axis=axis, implementation=how, atomic_gradients=fast
            )

        def pulled(fast: bool) -> tuple[jax.Array, jax.Array]:
            dx, gradient = jax.vjp(lambda x, c: product(x, c, fast), x, codebook)[1](dy)
            return dx, gradient

        results = {
            "forward": lambda: product(x, codebook),
            "few rows": lambda: product(x[:_FEW], codebook),
            "dx": lambda: pulled(False)[0],
            "ordered gradient": lambda: pulled(False)[1],
            "atomic gradient": lambda: pulled(True)[1],
        }
        return [results[kernel]() for kernel in kernels]

    return jax.jit(program).lower(*arrays).compile()


def check(step: Step, problem: Problem, arrays: tuple[jax.Array, ...], kernels: tuple[str, ...], program: Any) -> None:
    """Records for each GPU kernel of a program whether its result is right."""
    expected, limit = oracle(problem, arrays), LIMITS[problem.dtype]
    for kernel, found in zip(kernels, program(*arrays), strict=True):
        value, scale = expected[kernel]
        error = float(np.max(np.abs(np.asarray(found, np.float64) - value) / scale))
        right = error <= limit and found.dtype == jnp.dtype(problem.dtype)  # an error that is no number is wrong
        step.fact(kernel, right=right, g=problem.g, axis=problem.axis, dtype=problem.dtype, error=error, limit=limit)


def _check_apart(step: Step, problem: Problem, implementation: str) -> None:
    """Checks the GPU kernels of a problem one by one, and records which of them cannot be compiled or run."""
    arrays = problem.arrays()
    for kernel in KERNELS:
        try:
            check(step, problem, arrays, (kernel,), compile_kernels(problem, arrays, (kernel,), implementation))
        except Exception as error:
            said = {"g": problem.g, "axis": problem.axis, "dtype": problem.dtype, "failed": _said(error)}
            step.fact(kernel, right=False, **said)


def _said(error: Exception) -> str:
    """Returns the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def run(step: Step) -> None:
    """Checks all problems; programs are compiled side by side, those of the usual settings first."""
    implementation = "interpret" if step.dry else "triton"
    dtypes = ("bfloat16", "float32", "float16")
    problems = [Problem(g, axis, dtype) for g in GROUPS for dtype in dtypes for axis in ("out", "in")]
    if step.dry:
        small = {"m": 4, "d_in": 12, "d_out": 10}
        problems = [Problem(4, "out", "bfloat16", **small), Problem(6, "in", "float32", **small)]
    failed = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ready = {}
        for problem in problems:
            arrays = problem.arrays()
            ready[pool.submit(compile_kernels, problem, arrays, KERNELS, implementation)] = problem, arrays
        for future in as_completed(ready):
            problem, arrays = ready[future]
            try:
                program = future.result()
                check(step, problem, arrays, KERNELS, program)
            except Exception as error:
                step.fact("failed together", g=problem.g, axis=problem.axis, dtype=problem.dtype, failed=_said(error))
                failed.append(problem)
    for problem in failed:
        _check_apart(step, problem, implementation)
