"""abstract: the shapes of what cluster_tree gives."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cluscomp_jax import CompressionRule, InputError, abstract, cluster_tree
from cluscomp_jax.config.clustering import ClusterConfig

RULES = [
    CompressionRule(pattern="a/0", num_codes=300, group_size=5, axes="d l n h -> l | d | n h"),
    CompressionRule(pattern="a/1", num_codes=7, axis="in"),
]


def tree():
    random = np.random.default_rng(0)
    return {"a": [random.standard_normal(shape).astype(np.float32) for shape in ((64, 2, 4, 8), (9, 8))], "b": 3}


def test_it_has_the_structure_shapes_and_dtypes_of_the_clustered_tree():
    expected = cluster_tree(tree(), RULES)
    for shapes in (tree(), {**tree(), "a": jax.eval_shape(lambda: tree()["a"])}):
        found = abstract(shapes, RULES)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found["a"]), jax.tree.leaves(expected["a"]), strict=True):
            assert isinstance(one, jax.ShapeDtypeStruct)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert [(w.shape, w.dtype, w.stack) for w in found["a"]] == [(w.shape, w.dtype, w.stack) for w in expected["a"]]


def test_shardings_of_dense_arrays_and_the_dtype_of_codebooks_are_kept():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())
    shapes = {"w": np.ones((8, 4), np.float32), "b": jax.ShapeDtypeStruct((3,), np.float32, sharding=sharding)}
    settings = ClusterConfig(codebook_dtype="bfloat16")
    found = abstract(shapes, [CompressionRule(pattern="w", num_codes=4)], settings=settings)
    assert found["b"].sharding == sharding
    assert found["w"].codebook.dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("change", "rules", "message"),
    [
        ({}, [dataclasses.replace(RULES[0], num_codes=3000)], "more than the 32 of float32"),
        ({}, [CompressionRule(pattern="c")], "decides over no leaf"),
        ({"b": np.ones((4, 4), np.int8)}, [CompressionRule(pattern="b")], "b is int8"),
        ({"b": np.ones((0, 4), np.float32)}, [CompressionRule(pattern="b")], "is empty"),
        ({"b": 3}, [CompressionRule(pattern="b")], "b is a int, no array"),
    ],
)
def test_what_cannot_be_clustered_is_refused(change, rules, message):
    with pytest.raises(InputError, match=message):
        abstract({**tree(), **change}, rules)
