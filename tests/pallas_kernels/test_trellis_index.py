"""Products and gradients of a trellis index, interpreted and by the definition, against streams of Python integers."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_problems import Problem, check, random_trellis, run

from pallas_kernels.codebook_matmul import codebook_matmul, strips
from pallas_kernels.codebook_matmul.definition import codes_of, stream_words, streams_of


def check_run(problem, **options):
    arrays = problem.arrays()
    check(problem, arrays, run(problem, arrays, **options))


@pytest.mark.parametrize("atomic_gradients", [False, True], ids=["ordered", "atomic"])
@pytest.mark.parametrize("seed", range(6))
def test_the_interpreted_kernels_agree_with_the_oracle(seed, atomic_gradients):
    check_run(
        random_trellis(seed + 100 * atomic_gradients), implementation="interpret", atomic_gradients=atomic_gradients
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_definition_agrees_with_the_oracle(seed):
    check_run(random_trellis(1000 + seed), implementation="definition")


@pytest.mark.parametrize("step_bits", range(1, 10))
def test_every_step_from_one_bit_to_the_whole_window(step_bits):
    """The sides end inside a tile and inside a word; some windows lie in two words."""
    axis = ("out", "in")[step_bits // 2 % 2]
    problem = Problem(m=2, d_in=71, d_out=139, n=512, g=1 + step_bits % 4, axis=axis, step_bits=step_bits)
    check_run(problem, implementation="interpret", atomic_gradients=step_bits % 2 == 1)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("step_bits", [2, 4, 6, 8, 12])
def test_whole_tiles(step_bits, axis):
    """No load is masked; the words of a tile are expanded, or at 12 bits a window is as long as its step."""
    problem = Problem(m=1, d_in=256, d_out=256, n=4096, g=2, axis=axis, dtype="bfloat16", step_bits=step_bits)
    check_run(problem, implementation="interpret", atomic_gradients=True)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_gradient_of_several_strips_is_that_of_one(axis, monkeypatch):
    problem = Problem(m=8, d_in=44, d_out=52, n=64, g=3, axis=axis, step_bits=5)
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 3 * 18 * 7)
    check_run(problem, implementation="interpret")


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("window", [1, 12, 16])
def test_codes_are_windows_and_streams_are_made_of_them(window, axis):
    """Every step, and lengths around a word's; `streams_of` gives the bits back, and 0 past the stream's end."""
    for step_bits in range(1, window + 1):
        for length in (1, 33):
            sides = (3, length) if axis == "out" else (length, 3)
            problem = Problem(m=1, d_in=sides[0], d_out=sides[1], n=2**window, g=1, axis=axis, step_bits=step_bits)
            streams = jnp.asarray(problem.streams(np.random.default_rng(length)))
            assert streams.shape[axis == "out"] == stream_words(length, 2**window, step_bits)
            fixed = {"num_codes": 2**window, "axis": axis, "step_bits": step_bits}
            codes = codes_of(streams, shape=sides, g=1, **fixed)
            np.testing.assert_array_equal(codes, problem.codes(streams))
            again = np.asarray(streams_of(codes, **fixed))
            bits = window + (length - 1) * step_bits
            words = np.moveaxis(np.asarray(streams), 1 if axis == "out" else 0, 0).copy()
            words[-1] &= np.uint32(2 ** (bits - 32 * (len(words) - 1)) - 1)
            np.testing.assert_array_equal(np.moveaxis(again, 1 if axis == "out" else 0, 0), words)


RIGHT = {"x": jnp.ones((2, 8)), "codebook": jnp.ones((16, 2)), "index": jnp.zeros((8, 1), jnp.uint32)}
WRONG = {
    "codes": ({"codebook": jnp.ones((12, 2))}, "the codebook has 12 codes; a trellis index takes a power of two"),
    "no bit": ({"step_bits": 0}, "step_bits is 0; windows of 4 bits take 1 to 4"),
    "many bits": ({"step_bits": 5}, "step_bits is 5; windows of 4 bits take 1 to 4"),
    "one code": ({"codebook": jnp.ones((1, 2))}, "step_bits is 3; windows of 0 bits take 1 to 0"),
    "index dtype": ({"index": jnp.zeros((8, 1), jnp.uint16)}, "the index is uint16; it must be uint32"),
    "signed": ({"index": jnp.zeros((8, 1), jnp.int32)}, "the index is int32; it must be uint32"),
    "words": (
        {"index": jnp.zeros((8, 4), jnp.uint32)},
        "the index has shape (8, 4), (8, 8) cut by 2 along 'out' needs (8, 1)",
    ),
    "axis": ({"axis": "in"}, "the index has shape (8, 1), (8, 8) cut by 2 along 'in' needs (1, 8)"),
    "not a trellis": ({"step_bits": None}, "the index is uint32; it must be uint8 or uint16"),
}


@pytest.mark.parametrize(("changed", "text"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_with_both_values(changed, text):
    options = {"shape": (8, 8), "axis": "out", "step_bits": 3} | changed
    arrays = [options.pop(name, value) for name, value in RIGHT.items()]
    with pytest.raises(ValueError) as caught:
        codebook_matmul(*arrays, **options)
    assert text in str(caught.value)
