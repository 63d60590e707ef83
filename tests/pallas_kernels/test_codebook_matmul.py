"""The kernels, interpreted, and the definition against the oracle; what the public op chooses and refuses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_problems import Problem, check, random_problem, run

from pallas_kernels import implementation
from pallas_kernels._compat import lowering_for
from pallas_kernels.codebook_matmul import ATOMIC_GRADIENTS, IMPLEMENTATION, api, codebook_matmul, config, strips


@pytest.mark.parametrize("atomic_gradients", [False, True], ids=["ordered", "atomic"])
@pytest.mark.parametrize("seed", range(9))
def test_the_interpreted_kernels_agree_with_the_oracle(seed, atomic_gradients):
    problem = random_problem(seed + 100 * atomic_gradients)
    arrays = problem.arrays()
    check(problem, arrays, run(problem, arrays, implementation="interpret", atomic_gradients=atomic_gradients))


@pytest.mark.parametrize("seed", range(6))
def test_the_definition_agrees_with_the_oracle(seed):
    problem = random_problem(1000 + seed)
    arrays = problem.arrays()
    check(problem, arrays, run(problem, arrays, implementation="definition"))


def sums_of(problem, **options):
    return [np.asarray(value, np.float64) for value in run(problem, problem.arrays(), **options)]


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_gradient_of_several_strips_is_that_of_one(axis, monkeypatch):
    problem = Problem(m=8, d_in=44, d_out=52, n=30, g=6, axis=axis)
    whole = sums_of(problem, implementation="interpret")[2]
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 6 * 9 * 7)
    np.testing.assert_allclose(sums_of(problem, implementation="interpret")[2], whole, rtol=1e-5, atol=1e-5)


def test_a_layer_axis_under_scan_and_vmap():
    problem = Problem(m=3, d_in=24, d_out=16, n=9, g=4, axis="out")
    x, codebook, index, _ = problem.arrays()
    layers = (jnp.stack([codebook, 2 * codebook]), jnp.stack([index, index[::-1]]))

    def loss(codebooks, indices, how):
        def one(codebook, index):
            return jnp.sum(codebook_matmul(x, codebook, index, **problem.static, implementation=how) ** 2)

        scanned = jax.lax.scan(lambda total, layer: (total + one(*layer), None), 0.0, (codebooks, indices))[0]
        return scanned + jnp.sum(jax.vmap(one)(codebooks, indices))

    found, expected = (
        jax.jit(jax.value_and_grad(loss), static_argnums=2)(*layers, how) for how in ("interpret", "definition")
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-3)


def test_leading_axes_of_x_are_kept():
    problem = Problem(m=6, d_in=20, d_out=24, n=5, g=4, axis="in")
    x, codebook, index, _ = problem.arrays()
    y = codebook_matmul(x.reshape(2, 3, 20), codebook, index, **problem.static, implementation="interpret")
    np.testing.assert_array_equal(
        y.reshape(6, 24), codebook_matmul(x, codebook, index, **problem.static, implementation="interpret")
    )


def test_a_program_for_a_cuda_device_holds_the_kernels(monkeypatch):
    problem = Problem(m=32, d_in=64, d_out=128, n=16, g=4, axis="out", dtype="bfloat16")
    x, codebook, index, _ = problem.arrays()
    monkeypatch.setattr(implementation, "cuda_can_be_compiled", lambda: True)
    product = jax.jit(lambda x, c: codebook_matmul(x, c, index, **problem.static))
    with lowering_for((8, 6)):
        assert "xla.gpu.triton" in product.trace(x, codebook).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in product.trace(x, codebook).lower(lowering_platforms=("cpu",)).as_text()


def test_what_no_kernel_can_serve_is_decoded_and_said_once(monkeypatch, caplog):
    problem = Problem(m=2, d_in=8, d_out=8, n=3, g=4, axis="out")
    x, codebook, index, _ = problem.arrays()
    monkeypatch.setattr(implementation, "cuda_can_be_compiled", lambda: True)
    monkeypatch.setattr(api, "_KERNEL_DTYPES", ("bfloat16",))
    api._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        results = [codebook_matmul(x, codebook, index, **problem.static) for _ in range(2)]
    np.testing.assert_array_equal(results[0], x @ api.definition.decode(codebook, index, **problem.static))
    (record,) = caplog.records
    assert "x is float32, the GPU kernels take bfloat16" in record.getMessage()
    with pytest.raises(NotImplementedError, match="x is float32, the GPU kernels take bfloat16"):
        codebook_matmul(x, codebook, index, **problem.static, implementation="triton")


WRONG = {
    "channels": ({"x": jnp.ones((2, 7))}, "x has shape (2, 7), the matrix takes 8 channels"),
    "index shape": ({"index": jnp.zeros((8, 3), jnp.uint8)}, "the index has shape (8, 3), (8, 8) cut by 4 along 'out'"),
    "index dtype": ({"index": jnp.zeros((8, 2), jnp.int32)}, "the index is int32; it must be uint8 or uint16"),
    "x dtype": ({"x": jnp.ones((2, 8), jnp.int32)}, "x is int32; it must be floating"),
    "group": ({"codebook": jnp.ones((3, 33))}, "the codebook is [3, 33]; codes must be 1 to 65536, group 1 to 32"),
    "rank": ({"codebook": jnp.ones(3)}, "the codebook has shape (3,)"),
    "axis": ({"axis": "up"}, "axis is 'up'"),
    "implementation": ({"implementation": "cuda"}, "implementation is 'cuda'"),
}


@pytest.mark.parametrize(("changed", "text"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_with_both_values(changed, text):
    right = {"x": jnp.ones((2, 8)), "codebook": jnp.ones((3, 4)), "index": jnp.zeros((8, 2), jnp.uint8)}
    options = {"shape": (8, 8), "axis": "out"} | changed
    arrays = [options.pop(name, value) for name, value in right.items()]
    with pytest.raises(ValueError) as caught:
        codebook_matmul(*arrays, **options)
    assert text in str(caught.value)


@pytest.mark.parametrize("m", [1, 16, 64, 2048])
@pytest.mark.parametrize("g", [1, 6, 32])
def test_tiles_fit_any_group_and_cover_the_depth(m, g):
    tile = config.gemm_config(m, 8192, 1024, g=g, n=65536, itemsize=2)
    lanes = config.padded_group(g)
    assert tile.block_n % lanes == tile.block_k % lanes == 0
    assert 8192 // (tile.splits * tile.block_k) >= 4
    assert config.segment_config(300, g).block_codes >= 1


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("g", [1, 2, 3, 8, 32])
def test_the_tiles_of_a_token_hold_whole_words_of_a_stream(g, bits, wide):
    steps = config.Steps(bits, wide)
    tile, lanes = config.gemm_config(1, 8192, 1024, g=g, n=65536, itemsize=2, steps=steps), config.padded_group(g)
    assert tile.block_n % lanes == tile.block_k % lanes == 0
    assert 2 * tile.block_n * tile.block_k <= 32768
    if g <= 2:
        assert (tile.block_n if wide else tile.block_k) // lanes % config.step_period(bits) == 0


def test_options_can_be_had_for_everything_traced_inside():
    problem = Problem(m=8, d_in=16, d_out=16, n=7, g=4, axis="out", dtype="bfloat16")
    x, codebook, index, dy = problem.arrays()

    def gradient(codebook):
        return jax.vjp(lambda c: codebook_matmul(x, c, index, **problem.static), codebook)[1](dy)[0]

    def lowered():
        with lowering_for((8, 6)):
            return jax.jit(gradient).trace(codebook).lower(lowering_platforms=("cuda",)).as_text()

    with IMPLEMENTATION("triton"), ATOMIC_GRADIENTS(True):
        assert "codebook_scatter" in lowered()
    with IMPLEMENTATION("triton"):
        assert "codebook_segment_sum" in lowered()
    with IMPLEMENTATION("definition"):
        assert "codebook" not in lowered().replace("codebook_matmul", "")
