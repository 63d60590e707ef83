"""k-means through the GPU kernels, interpreted, against the definition; and what is fixed for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_compiler

from cluscomp_jax.clustering.refine import Curvature, update_codebook
from cluscomp_jax.kmeans import fit
from cluscomp_jax.kmeans.assignment import add_by_code
from cluscomp_jax.kmeans.probe_lists import make_probe_lists
from cluscomp_jax.kmeans.search import search_all, search_listed
from cluscomp_jax.kmeans.tree import grow_tree, random_rotation
from cluscomp_jax.plan import find_target, placement
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.target import compiling_for
from cluscomp_jax.trellis.fit import improve
from cluscomp_jax.trellis.viterbi import Trellis
from pallas_kernels.implementation import IMPLEMENTATION


def problem(m, g, n):
    rng = np.random.default_rng(n)
    vectors, codebook = rng.standard_normal((m, g)), rng.standard_normal((n, g))
    return fit.make_blocks(jnp.asarray(vectors, jnp.float32), None), jnp.asarray(codebook, jnp.float32)


def inputs(blocks, codebook):
    tree = grow_tree(codebook, random_rotation(jax.random.key(0), 0, g=codebook.shape[1]))
    return tree, make_probe_lists(tree, codebook, length=4)


@pytest.mark.parametrize("n", [20, 100], ids=["all codes", "lists"])
def test_the_kernels_assign_and_add_up_as_the_definition_does(n):
    blocks, codebook = problem(300, 3, n)

    def assigned():
        if n == 20:
            return search_all(blocks, codebook)
        nobody = jnp.full(blocks.weights.shape, -1, jnp.int32)  # donated
        return search_listed(blocks, nobody, codebook, *inputs(blocks, codebook))

    with IMPLEMENTATION("definition"):
        expected = assigned()
    with IMPLEMENTATION("interpret"):
        found = assigned()
    np.testing.assert_array_equal(found.nearest, expected.nearest)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.inertia, expected.inertia, rtol=1e-5)


def test_sorted_sums_are_those_of_a_scatter():
    rng = np.random.default_rng(0)
    rows, codes = rng.integers(-9, 10, (4, 30, 3)).astype(np.float32), rng.integers(0, 7, (4, 30)).astype(np.int32)
    expected = np.ones((8, 3), np.float32)
    np.add.at(expected, codes, rows)
    with IMPLEMENTATION("interpret"):
        np.testing.assert_array_equal(add_by_code(jnp.ones((8, 3)), jnp.asarray(rows), jnp.asarray(codes)), expected)


def test_more_codes_are_compared_and_blocks_are_larger_on_a_gpu():
    assert [fit.compares_all(n, gpu=gpu) for n in (256, 257, 4096, 4097) for gpu in (False, True)] == [
        True, True, False, True, False, True, False, False,
    ]  # fmt: skip
    shapes = jax.ShapeDtypeStruct((2**21, 4), "float32")
    assert fit.make_blocks.eval_shape(shapes, None, gpu=True).weights.shape == (2, 2**20)
    assert fit.make_blocks.eval_shape(shapes, None).weights.shape == (8, 2**18)


@needs_compiler
@pytest.mark.parametrize("name", ["all codes", "lists", "new codebook", "trellis"])
def test_no_sum_of_a_compiled_program_is_in_any_order(name):
    """XLA adds by atomics where a scatter has a sum for its computation; a sort by code leaves it none."""
    card = find_target("a6000")
    with compiling_for(card):
        place = AbstractDevice(placement(card))
        blocks, codebook = place.like(jax.eval_shape(lambda: problem(5000, 4, 300)))
        if name == "all codes":
            traced = search_all.trace(blocks, codebook)
        elif name == "lists":
            tree, lists = place.like(jax.eval_shape(inputs, blocks, codebook))
            traced = search_listed.trace(
                blocks, place.array(*blocks.weights.shape, dtype="int32"), codebook, tree, lists
            )
        elif name == "new codebook":
            curvature = Curvature(place.array(16, dtype="int32"), place.array(16, 16))
            index = place.array(16, 8, dtype="int32")
            traced = update_codebook.trace(place.array(16, 32), codebook, index, curvature)
        else:
            arrays = (place.array(16, 96, 2), place.array(16), place.array(64, 2), place.array(64, 2))
            traced = improve.trace(*arrays, place.key(), place.array(), trellis=Trellis(6, 2))
        text = traced.lower().compile().as_text()
    assert "code" in text
    assert not [line for line in text.splitlines() if " scatter(" in line and "f32[" in line.partition(" scatter(")[0]]
