"""Training on eight virtual devices, meshes of every kind, against one device; and where the arrays lie."""

import numpy as np
import pytest
from paths import HELPERS
from rounding import epsilon, of_sum
from training_models import MODEL
from virtual_devices import run_on_devices

from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.training import make_sharding

pytestmark = pytest.mark.long

MESHES = ("data", "fsdp", "tensor", "combined")
PROGRAM = HELPERS / "mesh_runs.py"
PRODUCTS = 2 * (3 * 9 + 1)
"""Products that a gradient passes through, forward and back: 7 kernels and 2 of attention in 3 blocks, and the head."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_on_devices(PROGRAM, 8, tmp_path_factory.mktemp("mesh") / "runs.json")


def error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_first_gradient_is_that_of_one_device(runs, mesh):
    found, expected = (runs["meshes"][name]["gradient"] for name in (mesh, "one"))
    assert found.keys() == expected.keys()
    worst = max(error(found[name], expected[name]) for name in expected)
    assert worst <= PRODUCTS * epsilon()  # each product sums in another order, and rounds once more


@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_have_the_losses_of_one_device(runs, mesh):
    found, expected = (runs["meshes"][name]["losses"] for name in (mesh, "one"))
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_leaves_everything_where_it_was_and_moments_with_their_masters(runs, mesh):
    run = runs["meshes"][mesh]
    assert not run["moved"]
    expected = {"data": "()", "fsdp": "(None, 'fsdp')", "tensor": "(None, 'tensor')"}
    assert set(run["moments"]) == {"P" + expected.get(mesh, "(None, ('fsdp', 'tensor'))")}


def test_matrices_lie_in_parts_and_a_dimension_that_does_not_divide_stays_whole(runs):
    places = runs["meshes"]["combined"]["places"]
    assert places["0-1/mlp/up_proj/kernel"] == "P(None, 'fsdp', 'tensor')"
    assert places["0-1/mlp/down_proj/kernel"] == places["0-1/self_attn/o_proj/kernel"] == "P(None, 'tensor', 'fsdp')"
    assert places["0-1/mlp/up_proj/kernel/codebook"] == "P(None, ('fsdp', 'tensor'), None)"
    assert places["rest/lm_head/kernel"] == "P('fsdp', 'tensor')"
    assert runs["meshes"]["tensor"]["places"]["0-1/self_attn/k_proj/kernel"] == "P(None, 'fsdp', None)"  # 4 pieces of 8


def test_indices_move_as_they_are_stored_and_of_gradients_only_the_codebooks(runs):
    gathered = [shapes for shapes, layer_type in runs["meshes"]["fsdp"]["collectives"] if layer_type == "all-gather"]
    blocks = [shape for shape in gathered if not shape.startswith(("f32[32,40]", "f32[40,32]"))]  # head, embedding
    assert blocks
    assert all(shape.startswith(("u8[", "f32[1,16,4]")) for shape in blocks)
    reduced = [shapes for shapes, layer_type in runs["meshes"]["data"]["collectives"] if layer_type == "all-reduce"]
    assert any("f32[16,4]" in shapes for shapes in reduced)
    for matrix in ("f32[32,32]", "f32[32,64]", "f32[64,32]", "f32[32,16]"):
        assert not [shapes for shapes in reduced if matrix in shapes]


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("implementation", ["definition", "interpret"])
def test_a_sharded_product_and_its_gradients_are_those_of_the_whole(runs, implementation, side):
    assert max(runs["kernels"][f"{implementation}-{side}"]) <= of_sum(64)  # sides of 32 and 64 are summed


def test_a_repeated_pattern_of_layers_has_the_losses_of_one_device(runs):
    found = runs["patterned"]
    assert found["one"][2] < found["one"][0]
    np.testing.assert_allclose(found["combined"], found["one"], rtol=1e-5)


def test_a_state_saved_on_one_mesh_goes_on_on_another_and_on_one_device(runs):
    resumed = runs["resumed"]
    found, expected = resumed["losses"]
    assert len(expected) == 6
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert resumed["indices"]
    assert resumed["codebooks"] <= 1e-3  # numbers of float16 of about 0.3, perhaps rounded to the other side


def test_the_plan_counts_what_one_device_holds(runs):
    one, combined = runs["planned"]["one"], runs["planned"]["combined"]
    for plan in (one, combined):
        assert plan["arguments"] == pytest.approx(plan["held"], rel=0.02)
    assert combined["held"] < 0.4 * one["held"]


def test_a_mesh_of_another_size_than_there_are_devices_is_refused():
    with pytest.raises(InputError, match=r"mesh data=3,fsdp=1,tensor=1 takes 3 devices, there are 1 in 1 process"):
        make_sharding(MeshConfig(data=3), MODEL)


def test_one_device_has_no_mesh():
    assert make_sharding(MeshConfig(), MODEL) is None
