"""flax.serialization of trees with CodebookArrays, whichever of the two libraries was imported first."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import serialization
from random_trees import same

from cluscomp_jax import CompressionRule, InputError, abstract, cluster_tree, partition

RULES = [CompressionRule(pattern="w", num_codes=5, axes="l d f -> l | d | f")]


def dense():
    return {"w": np.random.default_rng(0).standard_normal((2, 8, 12)).astype(np.float32), "b": np.ones(3, np.float32)}


def test_bytes_and_state_dicts_give_the_tree_back():
    tree = cluster_tree(dense(), RULES)
    state = serialization.to_state_dict(tree)
    assert set(state["w"]) == {"codebook", "index"}
    for found in (
        serialization.from_bytes(tree, serialization.to_bytes(tree)),
        serialization.from_state_dict(abstract(dense(), RULES), state),
    ):
        assert same(found["w"], tree["w"])
        assert same(found["b"], tree["b"])


def test_the_trainable_part_of_a_tree_is_serialized():
    trainable, _ = partition(cluster_tree(dense(), RULES))
    found = serialization.from_bytes(trainable, serialization.to_bytes(trainable))
    assert same(found["w"].codebook, np.asarray(trainable["w"].codebook))
    assert found["w"].index is None


def test_another_state_is_one_line():
    tree = cluster_tree(dense(), RULES)
    state = serialization.to_state_dict(tree)
    one = {**tree, "w": jax.tree.map(lambda leaf: leaf[0], tree["w"])}
    other = dataclasses.replace(tree["w"], codebook=tree["w"].codebook[:, :4])
    for target, given, message in (
        (one, state, r"w/codebook: the state has shape \(2, 5, 4\), the target \(5, 4\)"),
        ({**tree, "w": other}, state, r"w/codebook: the state has shape \(2, 5, 4\), the target \(2, 4, 4\)"),
        (tree, serialization.to_state_dict(dense()), "w: the state of a CodebookArray has codebook, index; found nda"),
    ):
        with pytest.raises(InputError, match=message):
            serialization.from_state_dict(target, given)


@pytest.mark.parametrize("order", [("flax.serialization", "cluscomp_jax"), ("cluscomp_jax", "flax.serialization")])
def test_the_order_of_imports_does_not_matter(order):
    program = f"""
import sys
import {order[0]}
import numpy as np
import cluscomp_jax, cluscomp_jax.core.codebook
assert {order[0] != "cluscomp_jax"} or "flax" not in sys.modules
import {order[1]}
from flax import serialization
w = cluscomp_jax.CodebookArray(np.ones((2, 4)), np.zeros((3, 1), np.uint8), (3, 4))
assert serialization.from_bytes(w, serialization.to_bytes(w)).codebook.shape == (2, 4)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
