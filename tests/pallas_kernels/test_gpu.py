"""The kernels on a CUDA device against the oracle: `pytest -m gpu`. Skipped, with the reason, where there is none."""

import jax
import numpy as np
import pytest
from kernel_problems import Problem, check, random_problem, random_trellis, run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda_device():
    if jax.default_backend() != "gpu":
        pytest.skip(f"no CUDA device: JAX runs on {jax.default_backend()}")


@pytest.mark.parametrize("atomic_gradients", [False, True], ids=["ordered", "atomic"])
@pytest.mark.parametrize("seed", range(40))
def test_values(seed, atomic_gradients):
    problem = random_problem(seed)
    arrays = problem.arrays()
    check(problem, arrays, run(problem, arrays, implementation="triton", atomic_gradients=atomic_gradients))


@pytest.mark.parametrize("atomic_gradients", [False, True], ids=["ordered", "atomic"])
@pytest.mark.parametrize("seed", range(40))
def test_values_of_trellis_indices(seed, atomic_gradients):
    problem = random_trellis(seed)
    arrays = problem.arrays()
    check(problem, arrays, run(problem, arrays, implementation="triton", atomic_gradients=atomic_gradients))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("step_bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("m", [1, 64, 200])
def test_values_of_trellis_indices_at_whole_tiles(m, step_bits, axis):
    problem = Problem(m=m, d_in=512, d_out=512, n=4096, g=2, axis=axis, dtype="bfloat16", step_bits=step_bits)
    arrays = problem.arrays()
    check(problem, arrays, run(problem, arrays, implementation="triton"))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("g", [4, 6, 16])
@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_values_at_whole_tiles(m, g, axis):
    problem = Problem(m=m, d_in=512, d_out=512, n=4096, g=g, axis=axis, dtype="bfloat16")
    arrays = problem.arrays()
    check(problem, arrays, run(problem, arrays, implementation="triton"))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_two_runs_give_the_same_bits(axis):
    problem = Problem(m=64, d_in=576, d_out=1536, n=256, g=4, axis=axis, dtype="bfloat16")
    arrays = problem.arrays()
    for first, second in zip(*(run(problem, arrays, implementation="triton") for _ in range(2)), strict=True):
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))
