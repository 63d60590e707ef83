"""The programs of k-means at the sizes of real models: none that XLA's compiler for a GPU cannot end with."""

import importlib.util
import math
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from cluscomp_jax.core.coding import index_shape
from cluscomp_jax.kmeans.assignment import _ROW, largest
from cluscomp_jax.models.model import build_model
from cluscomp_jax.plan import preset_config
from cluscomp_jax.plan.kmeans_programs import fit_programs
from cluscomp_jax.plan.shapes import AbstractDevice

MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-405b")
CODES = (
    (1, 16),
    (2, 256),
    (4, 64),
    (4, 256),
    (4, 1024),
    (4, 4096),
    (4, 65500),
    (5, 1024),
    (6, 1024),
    (8, 256),
    (8, 65500),
)
"""(g, n), those of the shipped configs among them."""
UNENDING = range(2**20, 2**21)
"""Of so many values `top_k` of few is cut into parts by XLA's TopkSplitter without an end (jax 0.10.2 to 0.12.0.1)."""

needs_compiler = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's CUDA compiler is not installed (extra aot)",
)


def vector_counts(model, g):
    """Returns the numbers of vectors [m, g] that the kernels of a model's block make."""
    shapes = build_model(preset_config(model)).block_shapes(0).values()
    return sorted({math.prod(index_shape(shape, g, "out")) for shape in shapes if len(shape) == 2})


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                    yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_no_program_takes_the_largest_of_a_number_of_values_that_xla_cannot_cut(model):
    seen = 0
    for g, n in CODES:
        for m in vector_counts(model, g):
            for program in fit_programs(AbstractDevice(), m, g, n, weighted=True, iterations=20, calls=1):
                for eqn in equations(program.traced.jaxpr.jaxpr):
                    if eqn.primitive.name == "top_k":
                        seen += 1
                        width = eqn.invars[0].aval.shape[-1]
                        assert width not in UNENDING, (program.name, m, g, n)
    assert seen > len(CODES)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 100, _ROW, _ROW + 1, 3 * _ROW - 5]), st.integers(1, 4096))
def test_the_largest_are_those_of_one_sort(seed, width, count):
    values = np.random.default_rng(seed).integers(0, 500, width).astype(np.float32)
    count = min(count, width)
    found, places = largest(jnp.asarray(values), count)
    expected = np.argsort(-values, kind="stable")[:count]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(found, values[expected])


COMPILE = """
import sys
from cluscomp_jax.plan import compiling_for, find_target, placement
from cluscomp_jax.plan.kmeans_programs import fit_programs
from cluscomp_jax.plan.program import compile_program
from cluscomp_jax.plan.shapes import AbstractDevice
m, g, n = map(int, sys.argv[1:4])
target = find_target("h100")
with compiling_for(target):
    for program in fit_programs(AbstractDevice(placement(target)), m, g, n, weighted=True, iterations=20, calls=1):
        if not sys.argv[4:] or program.name in sys.argv[4:]:
            compile_program(program)
            print(program.name, flush=True)
"""


def compiled(*arguments):
    """Returns the names of the programs that compile for an H100 within five minutes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COMPILE, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.split()


@needs_compiler
def test_the_update_that_never_compiled_does():
    assert compiled(8192 * 28672 // 4, 4, 256, "update") == ["update"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("g", "n"), CODES)
def test_every_program_compiles_for_a_gpu(model, g, n):
    for m in vector_counts(model, g):
        assert "update" in compiled(m, g, n)
